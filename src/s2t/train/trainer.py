"""The selector's training run: adapter, losses, and the adapter folder at the end.

Schedule, checkpoints and resuming are those of `fit.py`. Source of the recipe: arXiv 2604.26940; see docs/method.md for
where we differ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2t.config import TrainConfig
from s2t.core.bins import candidate_score, expected_bin
from s2t.core.losses import criticality_loss, listwise_kl, pairwise_margin, selection_cross_entropy
from s2t.errors import ModelError
from s2t.files import RunFolder, read_json, versions, write_json
from s2t.model.adapter import AdapterConfig, SelectorAdapter, selector_problems
from s2t.model.load import LoadedModel, load_model
from s2t.train.dataset import Batch, GroupData, make_batch, read_group_data
from s2t.train.fit import Fit
from s2t.train.forward import FrozenPrefixes, States, forward, lm_kl
from s2t.train.processes import Processes, open_processes

_TRAJECTORIES_TO_CHECK = 64
_TRAJECTORIES_AT_ONCE = 8


def train(config: TrainConfig) -> dict[str, Any]:
    """Train an adapter on collected groups; returns train.json. Same command again: resumes, or returns the finished run."""
    with open_processes(config.device) as processes:
        return _train(config, processes)


def _train(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    run = processes.open_run(config.out, "train", config)
    if run.is_complete:
        return read_json(run.file("train.json"))
    data = read_group_data(config.groups, config.num_candidates)
    loaded = load_model(config.slm, **processes.load_options(config))
    if not data.pair.startswith(loaded.fingerprint):
        raise ModelError(
            f"the groups were collected with {data.slm}, whose weights are not those of {config.slm}; use --slm {data.slm}."
        )
    torch.manual_seed(config.seed)
    adapter = SelectorAdapter(loaded, _adapter_config(config, data, loaded))
    trainer = Trainer(config, data, adapter, run, processes)
    trainer.fit()
    result, weights = trainer.summary(), trainer.full_parameters()
    if not processes.is_first:
        return result
    problems = {t.problem_id.rsplit("-", 1)[-1] for t in data.trajectories} | selector_problems(
        None, config.slm, config.revision
    )
    adapter.config = replace(adapter.config, trigger_rate=result["trigger_rate"])
    adapter.save(run.file("adapter"), tuple(problems), result, weights)
    write_json(run.file("train.json"), result)
    run.finish()
    trainer.clear()
    return result


def _adapter_config(config: TrainConfig, data: GroupData, loaded: LoadedModel) -> AdapterConfig:
    digest = hashlib.blake2b("\n".join(sorted({t.problem_id for t in data.trajectories})).encode(), digest_size=16)
    return AdapterConfig(
        base_model=config.slm,
        base_fingerprint=loaded.fingerprint,
        llm=data.llm,
        task=data.task,
        scope=config.adapter_scope,
        num_candidates=config.num_candidates,
        num_bins=config.num_bins,
        score_temperature=config.score_temperature,
        prior_weight=config.prior_weight,
        criticality=config.criticality,
        head_size=config.head_size,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        thresholds={"criticality": config.criticality_threshold},
        warmup_steps=data.warmup_steps,
        split_hashes={data.split: digest.hexdigest()},
        heldout_templates=data.heldout_templates,
        heldout_by_task=data.heldout_by_task,
        versions={name: version for name, version in versions().items() if version is not None},
    )


class Trainer(Fit):
    """One training run over fixed data; `fit` resumes from the run folder's checkpoint if there is one."""

    def __init__(
        self,
        config: TrainConfig,
        data: GroupData,
        adapter: SelectorAdapter,
        run: RunFolder,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(
            config,
            config.seed,
            adapter.base_model,
            adapter.trainable,
            [len(t.group_steps) for t in data.trajectories],
            [len(t.ids) for t in data.trajectories],
            config.batch_groups,
            run,
            parts=[adapter.selector],
            processes=processes,
        )
        self.config, self.data, self.adapter = config, data, adapter
        self.positive_weight = self._positive_weight()
        self.frozen: FrozenPrefixes | None = None

    def _positive_weight(self) -> float:
        """Negatives over positives among all trained steps."""
        critical = [t.divergence[self.data.warmup_steps :] > self.data.threshold for t in self.data.trajectories]
        rate = float(np.concatenate(critical).mean())
        return (1 - rate) / max(rate, 1e-6)

    def fit(self) -> None:
        """Run all remaining steps."""
        super().fit()
        self.adapter.act(False)

    def begin(self) -> None:
        """Read the checkpoint, and all prefixes where they never change, are needed more than once, and fit."""
        super().begin()
        room = self.config.prefix_cache_gib * 2**30
        if self.adapter.scope == "always" or self.num_steps <= self.steps_per_epoch:
            return
        if FrozenPrefixes.size(self.adapter, self.data.trajectories) <= room:
            self.frozen = FrozenPrefixes(self.adapter, self.data.trajectories, self.call, self.processes)

    def terms(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Terms of the loss on a batch of those trajectories."""
        data = self.data
        trajectories = [data.trajectories[i] for i in chosen]
        frozen = self.frozen.take(chosen) if self.frozen is not None else None
        device = self.adapter.loaded.device
        reads_prefixes = frozen is None or self.adapter.scope != "candidates"
        batch = make_batch(trajectories, data.threshold, data.warmup_steps, device, has_ids=reads_prefixes)
        return self.losses(forward(self.adapter, batch, frozen), batch)

    def counts(self, chosen: Sequence[int]) -> dict[str, int]:
        """Selection terms are means over groups, the others over trained steps."""
        trajectories = [self.data.trajectories[i] for i in chosen]
        groups = sum(len(t.group_steps) for t in trajectories)
        steps = sum(max(0, len(t.token_ids) - self.data.warmup_steps) for t in trajectories)
        return {"ce": groups, "pairwise": groups, "listwise": groups, "criticality": steps, "lm": steps}

    def one_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on a batch of one's own; returns the line of the log."""
        self.seed_step()
        return self.optimize(self.losses(forward(self.adapter, batch), batch))

    def losses(self, states: States, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms of the loss; their sum is minimised. Source: METHOD section 3, arXiv 2604.26940."""
        config, adapter = self.config, self.adapter
        bins = adapter.selector.bin_logits(states.candidates)
        scores = candidate_score(bins, batch.slm_logprobs, config.score_temperature, config.prior_weight)
        terms = {
            "ce": config.ce_weight * selection_cross_entropy(scores, batch.llm_probs),
            "pairwise": config.pairwise_weight
            * pairwise_margin(expected_bin(bins), batch.llm_probs, config.pairwise_margin),
            "listwise": config.listwise_weight * listwise_kl(scores, batch.llm_probs),
            "criticality": config.criticality_weight
            * criticality_loss(
                adapter.selector.criticality_logits(states.steps), batch.is_critical, self.positive_weight
            ),
        }
        if states.base_steps is not None and config.lm_weight > 0:
            terms["lm"] = config.lm_weight * lm_kl(adapter, states)
        return terms

    @torch.no_grad()
    def _triggers(self) -> dict[str, float]:
        """Share of the steps of some training trajectories that are divergence points, and that the adapter fires at."""
        count = min(len(self.data.trajectories), _TRAJECTORIES_TO_CHECK)
        trajectories = self.data.trajectories[:count]
        fired = critical = steps = 0
        for start in range(0, count, _TRAJECTORIES_AT_ONCE):
            chosen = trajectories[start : start + _TRAJECTORIES_AT_ONCE]
            batch = make_batch(chosen, self.data.threshold, self.data.warmup_steps, self.adapter.loaded.device)
            values = self.call(self._criticality, batch)
            fired += int((values > self.config.criticality_threshold).sum())
            critical += int(batch.is_critical.sum())
            steps += batch.is_critical.numel()
        self.adapter.act(False)
        return {"divergence_rate": critical / steps, "trigger_rate": fired / steps}

    def _criticality(self, batch: Batch) -> Tensor:
        return self.adapter.selector.criticality_logits(forward(self.adapter, batch).steps).sigmoid()

    def summary(self) -> dict[str, Any]:
        """Counts, the losses over the first and the last tenth of the run, and how often the adapter triggers."""
        count = max(1, len(self.log) // 10)
        losses = [line["loss"] for line in self.log]
        return {
            "num_trajectories": len(self.data.trajectories),
            "num_groups": self.data.num_groups,
            "num_steps": self.num_steps,
            "num_trainable": self.num_trainable,
            "first_loss": float(np.mean(losses[:count])),
            "final_loss": float(np.mean(losses[-count:])),
            **self._triggers(),
            "final": self.final(("loss", "ce", "pairwise", "listwise", "lm", "criticality")),
        }
