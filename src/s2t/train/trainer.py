"""The selector's training run: adapter, losses, and the adapter folder at the end.

Schedule, checkpoints and resuming are those of `fit.py`. Source of the recipe: arXiv 2604.26940; see docs/method.md for
where we differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2t.config import TrainConfig
from s2t.core.losses import criticality_loss, listwise_kl, pairwise_margin, selection_cross_entropy
from s2t.errors import DataError, ModelError
from s2t.files import RunFolder, read_json, versions, write_json
from s2t.model.adapter import BRANCH_SCOPES, AdapterConfig, SelectorAdapter, selector_problems
from s2t.model.load import load_model
from s2t.model.loaded import LoadedModel
from s2t.progress import note
from s2t.train.dataset import Batch, GroupData, Trajectory, make_batch, read_group_data
from s2t.train.fit import Fit
from s2t.train.forward import FrozenPrefixes, States, forward, lm_kl
from s2t.train.processes import Processes, like, open_processes
from s2t.train.validation import HeldOut, split_by_problem
from s2t.train.watch import check_tracker

_TRAJECTORIES_TO_CHECK = 64
_TRAJECTORIES_AT_ONCE = 8
NO_BETTER = (
    "on {num_groups:,} held-out groups the selector agrees with the LLM at {adapter:.1%}, the SLM's own order at {slm:.1%}: not "
    "more often by more than chance. It was given weight 0, s2t-local will write what greedy writes; collect more problems, or "
    "train longer."
)


def train(config: TrainConfig) -> dict[str, Any]:
    """Train an adapter on collected groups; returns train.json. Same command again: resumes, or returns the finished run."""
    check_tracker(config.log_with)
    with open_processes(config.device) as processes:
        return _train(config, processes)


def _train(config: TrainConfig, processes: Processes) -> dict[str, Any]:
    run = processes.open_run(config.out, "train", config, ("log_with",))
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
    result = trainer.summary()
    adapter.config = trainer.adapter_config(result)
    weights = trainer.weights_to_save(adapter.config)
    if not processes.is_first:
        return result
    problems = {t.problem_id.rsplit("-", 1)[-1] for t in data.trajectories} | selector_problems(
        None, config.slm, config.revision
    )
    adapter.save(run.file("adapter"), tuple(problems), result, weights)
    write_json(run.file("train.json"), result)
    run.finish()
    trainer.clear()
    if result["held_out"] is not None and result["held_out"]["adapter_weight"] == 0:
        found = result["held_out"]
        rates = {name: found[name]["agreement"] for name in ("adapter", "slm")}
        note(NO_BETTER.format(num_groups=found["num_groups"], **rates))
    return result


def _adapter_config(config: TrainConfig, data: GroupData, loaded: LoadedModel) -> AdapterConfig:
    digest = hashlib.blake2b("\n".join(sorted({t.problem_id for t in data.trajectories})).encode(), digest_size=16)
    return AdapterConfig(
        base_model=config.slm,
        base_fingerprint=loaded.fingerprint,
        llm=data.llm,
        task=data.task,
        readout=config.readout,
        scope=config.scope,
        num_candidates=config.num_candidates,
        num_bins=config.num_bins,
        score_temperature=config.score_temperature,
        prior_weight=config.prior_weight,
        criticality=config.criticality,
        head_size=config.head_size,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        warmup_steps=data.warmup_steps,
        split_hashes={data.split: digest.hexdigest()},
        heldout_templates=data.heldout_templates,
        heldout_by_task=data.heldout_by_task,
        versions={name: version for name, version in versions().items() if version is not None},
    )


class Trainer(Fit):
    """One training run over fixed data; `fit` resumes from the run folder's checkpoint if there is one.

    The groups of some problems are held out: the weights kept are those that do best on them (`best`, by NLL).
    """

    def __init__(
        self,
        config: TrainConfig,
        data: GroupData,
        adapter: SelectorAdapter,
        run: RunFolder,
        processes: Processes | None = None,
    ) -> None:
        self.training, held = split_by_problem(data.trajectories, config.heldout_problems)
        self.held = [i for i in held if len(data.trajectories[i].group_steps)]
        trained = [data.trajectories[i] for i in self.training]
        if not any(len(t.group_steps) for t in trained):
            raise DataError(
                "no selection group is left to train on: all are of problems that are held out; collect more problems, or lower "
                "--heldout-problems."
            )
        super().__init__(
            config,
            config.seed,
            adapter.base_model,
            adapter.trainable,
            [len(t.group_steps) for t in trained],
            [len(t.ids) for t in trained],
            config.batch_groups,
            run,
            parts=[adapter.selector],
            processes=processes,
        )
        self.config, self.data, self.adapter = config, data, adapter
        self.weights = config.selection_weights
        self.positive_weight = self._positive_weight()
        self.frozen: FrozenPrefixes | None = None
        self.validation: list[dict[str, Any]] = []
        self.best: dict[str, Tensor] = {}

    def _positive_weight(self) -> float:
        """Negatives over positives among all trained steps."""
        critical = [t.divergence[self.data.warmup_steps :] > self.data.threshold for t in self.data.trajectories]
        rate = float(np.concatenate(critical).mean())
        return (1 - rate) / max(rate, 1e-6)

    def fit(self) -> None:
        """Run all remaining steps, and go back to the best weights seen."""
        super().fit()
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(like(value, self.parameters[name]))
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
        """Terms of the loss on a batch of those training trajectories."""
        states, batch = self._read([self.training[i] for i in chosen])
        return self.losses(states, batch)

    def _read(self, places: Sequence[int]) -> tuple[States, Batch]:
        """The batch of some trajectories of `data`, and its states under the adapter."""
        data = self.data
        frozen = self.frozen.take(places) if self.frozen is not None else None
        reads_prefixes = frozen is None or self.adapter.scope not in BRANCH_SCOPES
        trajectories = [data.trajectories[i] for i in places]
        device = self.adapter.loaded.device
        batch = make_batch(trajectories, data.threshold, data.warmup_steps, device, has_ids=reads_prefixes)
        return forward(self.adapter, batch, frozen, self.config.kept), batch

    def counts(self, chosen: Sequence[int]) -> dict[str, int]:
        """Selection terms are means over groups, the others over trained steps."""
        trajectories = [self.data.trajectories[self.training[i]] for i in chosen]
        groups = sum(len(t.group_steps) + self._num_kept(t) for t in trajectories)
        steps = sum(max(0, len(t.token_ids) - self.data.warmup_steps) for t in trajectories)
        return {"ce": groups, "pairwise": groups, "listwise": groups, "criticality": steps, "lm": steps}

    def _num_kept(self, t: Trajectory) -> int:
        quiet = int((t.divergence[self.data.warmup_steps :] <= self.data.threshold).sum())
        return min(round(self.config.kept * len(t.group_steps)), quiet)

    def one_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on a batch of one's own; returns the line of the log."""
        self.seed_step()
        return self.optimize(self.losses(forward(self.adapter, batch), batch))

    def losses(self, states: States, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms of the loss; their sum is minimised. Source: arXiv 2604.26940, and docs/method.md for `rank`."""
        config, adapter, weights = self.config, self.adapter, self.weights
        readings = adapter.readings(states.candidates, batch.candidate_ids)
        scores = adapter.combined(readings, batch.slm_logprobs, 1.0)
        terms = {
            "ce": lambda: selection_cross_entropy(scores, batch.llm_probs),
            "pairwise": lambda: pairwise_margin(
                readings * config.score_temperature, batch.llm_probs, config.pairwise_margin
            ),
            "listwise": lambda: listwise_kl(scores, batch.llm_probs),
        }
        losses = {name: weight * terms[name]() for name, weight in weights.items() if weight > 0}
        losses["criticality"] = config.criticality_weight * criticality_loss(
            adapter.selector.criticality_logits(states.steps), batch.is_critical, self.positive_weight
        )
        if states.base_steps is not None and config.lm_weight > 0:
            losses["lm"] = config.lm_weight * lm_kl(adapter, states)
        return losses

    # Held-out groups

    def after_step(self) -> None:
        """Look at the held-out groups now and then; keep the best weights, and stop when they have not got better for long."""
        if not self.held or (self.step % self.config.validation_steps and self.step < self.num_steps):
            return
        found = self.read_held_out()
        quality = found.quality(self.adapter.combined, 1.0)
        if not self.validation or quality["nll"] < min(line["nll"] for line in self.validation):
            self.best = self.full_parameters()
        precision = {"criticality_average_precision": found.average_precision()}
        self.validation.append({"step": self.step, **quality, **precision})
        best = min(range(len(self.validation)), key=lambda i: self.validation[i]["nll"])
        slm = {f"{name}_of_slm": value for name, value in found.slm().items()}
        seen = {**quality, **precision, **slm, "best_step": self.validation[best]["step"]}
        self.watch("held_out", seen, self.step)
        if self.config.patience and len(self.validation) - 1 - best >= self.config.patience:
            self.num_steps = self.step

    @torch.no_grad()
    def read_held_out(self, places: Sequence[int] | None = None) -> HeldOut:
        """Readings of the held-out trajectories (or others) under the adapter as it is now, dropout off."""
        self.model.eval()
        chosen = self.held if places is None else places
        parts = [
            self.call(self._held_out, chosen[i : i + _TRAJECTORIES_AT_ONCE])
            for i in range(0, len(chosen), _TRAJECTORIES_AT_ONCE)
        ]
        self.train_mode()
        return HeldOut.joined(parts)

    def _held_out(self, places: Sequence[int]) -> HeldOut:
        states, batch = self._read(places)
        problems = np.array([self.data.trajectories[i].problem_id for i in places])
        return HeldOut(
            self.adapter.readings(states.candidates, batch.candidate_ids).cpu(),
            batch.slm_logprobs.cpu(),
            batch.llm_probs.cpu(),
            self.adapter.criticality(states.steps).float().cpu().numpy(),
            batch.is_critical.cpu().numpy(),
            problems[batch.group_row.cpu().numpy()],
        )

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The best weights so far, and what the held-out groups said."""
        best = {f"best.{name}": value for name, value in self.best.items()}
        return best, {"validation": json.dumps(self.validation), "num_steps": str(self.num_steps)}

    def restore_extra(self, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
        """Go on from there."""
        self.best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        self.validation, self.num_steps = json.loads(texts["validation"]), int(texts["num_steps"])

    # What came out

    def adapter_config(self, result: Mapping[str, Any]) -> AdapterConfig:
        """The adapter's settings with what the held-out groups chose."""
        held_out = result["held_out"]
        return replace(
            self.adapter.config,
            trigger_rate=result["trigger_rate"],
            thresholds={"criticality": result["criticality_threshold"]},
            adapter_weight=1.0 if held_out is None else held_out["adapter_weight"],
        )

    def weights_to_save(self, config: AdapterConfig) -> dict[str, Tensor]:
        """All that is trained; under scope `always` a LoRA that earned no weight is zero, since it would change the LM itself."""
        weights = self.full_parameters()
        if config.scope != "always" or config.adapter_weight != 0:
            return weights
        return {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in weights.items()}

    def summary(self) -> dict[str, Any]:
        """Counts, losses at both ends of the run, what the held-out groups say, and how often the adapter triggers."""
        count = max(1, len(self.log) // 10)
        losses = [line["loss"] for line in self.log]
        found = self.read_held_out() if self.held else None
        sample = found or self.read_held_out(self.training[:_TRAJECTORIES_TO_CHECK])
        threshold = self.config.criticality_threshold
        if threshold is None:
            threshold = sample.threshold()
        self.adapter.act(False)
        combine = self.adapter.combined
        return {
            "num_trajectories": len(self.data.trajectories),
            "num_groups": self.data.num_groups,
            "num_steps": self.step,
            "num_trainable": self.num_trainable,
            "first_loss": float(np.mean(losses[:count])),
            "final_loss": float(np.mean(losses[-count:])),
            "criticality_threshold": threshold,
            "divergence_rate": float(sample.is_critical.mean()),
            "trigger_rate": float((sample.criticality > threshold).mean()),
            "held_out": None if found is None else found.report(combine, found.best_weight(combine), threshold),
            "validation": self.validation,
            "final": self.final(("loss", "ce", "pairwise", "listwise", "lm", "criticality")),
        }
