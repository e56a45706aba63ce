"""The slow ways, kept as references: what is measured against, and what the fast path must agree with.

Every function here does the obvious thing with plain forwards of the model and no cache shared between candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from s2t.core.losses import (
    criticality_loss,
    listwise_kl,
    lm_preserving_kl,
    pairwise_margin,
    selection_cross_entropy,
)
from s2t.core.rule import expected_bin, score
from s2t.model.adapter import SelectorAdapter
from s2t.train.dataset import Batch
from s2t.train.trainer import Trainer


@torch.inference_mode()
def score_candidates(
    adapter: SelectorAdapter, prefix_ids: list[int], candidate_ids: list[int], logprobs: Tensor
) -> Tensor:
    """Selection scores of bins by K forwards over the whole prefix, no cache; -> [K]. Equals a tree step, scope `always`."""
    adapter.act(True)
    states = []
    for token in candidate_ids:
        ids = torch.tensor([[*prefix_ids, token]], device=adapter.loaded.device)
        states.append(adapter.base_model.get_decoder()(ids, use_cache=False).last_hidden_state[0, -1])
    ids = torch.tensor(candidate_ids, device=adapter.loaded.device)
    return adapter.scores(torch.stack(states)[None], ids[None], logprobs[None])[0]


def training_step(trainer: Trainer, batch: Batch) -> float:
    """One optimizer step on K copies of every prefix, full-vocabulary logits at every position; returns the loss.

    Scope `always`, the paper's recipe. Groups go through one after the other and their gradients add up.
    """
    adapter, config = trainer.adapter, trainer.config
    count = len(batch.candidate_ids)
    total = 0.0
    for group in range(count):
        loss = _group_loss(trainer, batch, group) / count
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(list(trainer.parameters.values()), config.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    adapter.act(False)
    return total


def _group_loss(trainer: Trainer, batch: Batch, group: int) -> Tensor:
    adapter, config = trainer.adapter, trainer.config
    length = int(batch.prefix_lengths[group])
    prefix = batch.ids[int(batch.group_row[group]), :length]
    candidates = batch.candidate_ids[group]
    ids = torch.cat([prefix.expand(len(candidates), -1), candidates[:, None]], dim=1)  # [K, P + 1]
    model: Any = adapter.base_model
    adapter.act(False)
    with torch.no_grad():
        base = model(ids, use_cache=False).logits  # [K, P + 1, V]
    adapter.act(True)
    output = model(ids, use_cache=False, output_hidden_states=True)
    hidden = output.hidden_states[-1]  # [K, P + 1, H]
    bins = adapter.selector.bin_logits(hidden[:, -1])[None]  # [1, K, R]
    llm_probs = batch.llm_probs[group : group + 1]
    readings = expected_bin(bins) / config.score_temperature
    scores = score(readings, batch.slm_logprobs[group : group + 1], 1.0, config.prior_weight)
    row, column = batch.step_index
    steps = column[row == batch.group_row[group]]
    steps = steps[steps < length]
    critical = batch.is_critical[row == batch.group_row[group]][: len(steps)]
    weights = config.selection_weights
    loss = weights["ce"] * selection_cross_entropy(scores, llm_probs)
    loss = loss + weights["pairwise"] * pairwise_margin(expected_bin(bins), llm_probs, config.pairwise_margin)
    loss = loss + weights["listwise"] * listwise_kl(scores, llm_probs)
    loss = loss + config.lm_weight * lm_preserving_kl(base[0, steps], output.logits[0, steps])
    return loss + config.criticality_weight * criticality_loss(
        adapter.selector.criticality_logits(hidden[0, steps]), critical, trainer.positive_weight
    )
