"""The training run: adapter, losses, schedule, checkpoints, and the adapter folder at the end.

Every step depends on (seed, step) alone, so a killed run that resumes from its last checkpoint ends with the
weights of an undisturbed one. Source of the recipe: arXiv 2604.26940; see docs/method.md for where we differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from s2t.config import TrainConfig
from s2t.core.bins import candidate_score, expected_bin
from s2t.core.losses import criticality_loss, listwise_kl, pairwise_margin, selection_cross_entropy
from s2t.errors import ModelError
from s2t.files import RunFolder, read_json, read_jsonl, versions, write_bytes, write_json, write_text
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import LoadedModel, load_model
from s2t.progress import progress
from s2t.train.dataset import Batch, GroupData, make_batch, plan_batches, read_group_data
from s2t.train.forward import FrozenPrefixes, Prefixes, States, forward, lm_kl

_CHECKPOINT = "checkpoint.safetensors"
_LOG = "train_log.jsonl"
_TRAJECTORIES_TO_CHECK = 64
_TRAJECTORIES_AT_ONCE = 8


def train(config: TrainConfig) -> dict[str, Any]:
    """Train an adapter on collected groups; returns train.json. Same command again: resumes, or returns the finished run."""
    run = RunFolder.open(config.out, "train", config)
    if run.is_complete:
        return read_json(run.file("train.json"))
    data = read_group_data(config.groups, config.num_candidates)
    loaded = load_model(config.slm, **config.load_options)
    if not data.pair.startswith(loaded.fingerprint):
        raise ModelError(
            f"the groups were collected with {data.slm}, whose weights are not those of {config.slm}; use --slm {data.slm}."
        )
    torch.manual_seed(config.seed)
    adapter = SelectorAdapter(loaded, _adapter_config(config, data, loaded))
    trainer = Trainer(config, data, adapter, run)
    trainer.fit()
    result = trainer.summary()
    problems = tuple(sorted({t.problem_id.rsplit("-", 1)[-1] for t in data.trajectories}))
    adapter.save(run.file("adapter"), problems)
    write_json(run.file("train.json"), result)
    run.finish()
    run.file(_CHECKPOINT).unlink(missing_ok=True)  # last: a run killed before is finished from it, not begun again
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
        versions={name: version for name, version in versions().items() if version is not None},
    )


class Trainer:
    """One training run over fixed data; `fit` resumes from the run folder's checkpoint if there is one."""

    def __init__(self, config: TrainConfig, data: GroupData, adapter: SelectorAdapter, run: RunFolder) -> None:
        self.config, self.data, self.adapter, self.run = config, data, adapter, run
        self.parameters = adapter.trainable()
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.counts = [len(t.group_steps) for t in data.trajectories]
        self.steps_per_epoch = len(plan_batches(self.counts, config.batch_groups, config.seed, 0))
        self.num_steps = max(1, math.ceil(config.epochs * self.steps_per_epoch))
        self.positive_weight = self._positive_weight()
        self.log: list[dict[str, float]] = []
        self.step = 0

    def _positive_weight(self) -> float:
        """Negatives over positives among all trained steps."""
        critical = [t.divergence[self.data.warmup_steps :] > self.data.threshold for t in self.data.trajectories]
        rate = float(np.concatenate(critical).mean())
        return (1 - rate) / max(rate, 1e-6)

    def fit(self) -> None:
        """Run all remaining steps."""
        self._resume()
        frozen = self._frozen_prefixes()
        self.train_mode()
        with progress("train", self.num_steps, self.step) as advance:
            for chosen, batch in self._batches():
                self.log.append(self.one_step(batch, frozen.take(chosen) if frozen is not None else None))
                advance(1)
                if self.step % self.config.checkpoint_steps == 0:
                    self._save()
        self._save()
        self.adapter.base_model.eval()
        self.adapter.act(False)

    def _frozen_prefixes(self) -> FrozenPrefixes | None:
        """All prefixes, read once, where they never change, are needed more than once, and fit."""
        room = self.config.prefix_cache_gib * 2**30
        if self.adapter.scope == "always" or self.num_steps <= self.steps_per_epoch:
            return None
        if FrozenPrefixes.size(self.adapter, self.data.trajectories) > room:
            return None
        return FrozenPrefixes(self.adapter, self.data.trajectories)

    def train_mode(self) -> None:
        """Dropout inside the LoRA only; the base model stays in eval mode."""
        for name, module in self.adapter.base_model.named_modules():
            module.training = "lora_dropout" in name
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _batches(self) -> Iterator[tuple[list[int], Batch]]:
        """Trajectories and batches from the current step on; a plan of every epoch depends on (seed, epoch) alone."""
        epoch, plan = -1, []
        data, device = self.data, self.adapter.loaded.device
        while self.step < self.num_steps:
            wanted, place = divmod(self.step, self.steps_per_epoch)
            if wanted != epoch:
                epoch, plan = wanted, self._plan(wanted)
            chosen = [data.trajectories[i] for i in plan[place]]
            yield plan[place], make_batch(chosen, data.threshold, data.warmup_steps, device)

    def _plan(self, epoch: int) -> list[list[int]]:
        plan = plan_batches(self.counts, self.config.batch_groups, self.config.seed, epoch)
        return (plan * 2)[: self.steps_per_epoch]  # every epoch has as many steps as the first

    def one_step(self, batch: Batch, frozen: Prefixes | None = None) -> dict[str, float]:
        """One optimizer step; returns the line of the log."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        losses = self.losses(forward(self.adapter, batch, frozen), batch)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {name: float(value.detach()) for name, value in losses.items()}
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "loss": float(total.detach()),
            **values,
            "learning_rate": rate,
        }

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

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        config = self.config
        warmup = max(1, int(config.warmup_ratio * self.num_steps))
        if self.step < warmup:
            return config.learning_rate * (self.step + 1) / warmup
        part = (self.step - warmup) / max(1, self.num_steps - warmup)
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))

    def _save(self) -> None:
        tensors = {f"parameter.{name}": p.detach().cpu() for name, p in self.parameters.items()}
        for index, name in enumerate(self.parameters):
            for key, value in self.optimizer.state_dict()["state"].get(index, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().cpu()
        write_text(self.run.file(_LOG), "".join(json.dumps(line) + "\n" for line in self.log))
        write_bytes(self.run.file(_CHECKPOINT), save(tensors, metadata={"step": str(self.step)}))

    def _resume(self) -> None:
        path = self.run.file(_CHECKPOINT)
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.step = int(file.metadata()["step"])
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(tensors[f"parameter.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                state[index] = {
                    key: tensors[f"optimizer.{key}.{name}"] for key in keys if f"optimizer.{key}.{name}" in tensors
                }
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})
        if Path(self.run.file(_LOG)).exists():
            self.log = [line for line in read_jsonl(self.run.file(_LOG)) if line["step"] <= self.step]

    @torch.no_grad()
    def _triggers(self) -> dict[str, float]:
        """Share of the steps of some training trajectories that are divergence points, and that the adapter fires at."""
        count = min(len(self.data.trajectories), _TRAJECTORIES_TO_CHECK)
        trajectories = self.data.trajectories[:count]
        fired = critical = steps = 0
        for start in range(0, count, _TRAJECTORIES_AT_ONCE):
            chosen = trajectories[start : start + _TRAJECTORIES_AT_ONCE]
            batch = make_batch(chosen, self.data.threshold, self.data.warmup_steps, self.adapter.loaded.device)
            values = self.adapter.selector.criticality_logits(forward(self.adapter, batch).steps).sigmoid()
            fired += int((values > self.config.criticality_threshold).sum())
            critical += int(batch.is_critical.sum())
            steps += batch.is_critical.numel()
        self.adapter.act(False)
        return {"divergence_rate": critical / steps, "trigger_rate": fired / steps}

    def summary(self) -> dict[str, Any]:
        """Counts, the losses over the first and the last tenth of the run, and how often the adapter triggers."""
        count = max(1, len(self.log) // 10)
        head, tail = self.log[:count], self.log[-count:]
        names = [name for name in ("loss", "ce", "pairwise", "listwise", "lm", "criticality") if name in tail[-1]]
        return {
            "num_trajectories": len(self.data.trajectories),
            "num_groups": self.data.num_groups,
            "num_steps": self.num_steps,
            "num_trainable": sum(p.numel() for p in self.parameters.values()),
            "first_loss": float(np.mean([line["loss"] for line in head])),
            "final_loss": float(np.mean([line["loss"] for line in tail])),
            **self._triggers(),
            "final": {name: float(np.mean([line[name] for line in tail])) for name in names},
        }
