"""One optimisation: AdamW, warm-up and cosine, clipping, a log, and checkpoints that resume exactly.

Knows parameters, batches and named losses, not what they stand for; the selector's training and distillation are
both subclasses. Every step depends on (seed, step) alone, so a killed run that resumes from its last checkpoint ends
with the weights of an undisturbed one. Several processes share every batch; their losses and gradients add up to those of one.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from s2t.config import FitConfig
from s2t.errors import ModelError
from s2t.files import RunFolder, read_jsonl, write_bytes, write_text
from s2t.progress import count, progress
from s2t.train.dataset import plan_batches
from s2t.train.processes import Processes, Whole, full, like
from s2t.train.watch import Watch, open_watch

T = TypeVar("T")

CHECKPOINT = "checkpoint.safetensors"
LOG = "train_log.jsonl"


class Fit(ABC):
    """Fits the LoRA weights in `model`, and whatever else `parameters` names of it and of the further `parts`, to examples.

    `sizes` says how much each example adds to a batch of at least `batch_size`, `lengths` how many tokens it has. `fit` runs
    all steps and resumes from the run folder's checkpoint if there is one.
    """

    def __init__(
        self,
        config: FitConfig,
        seed: int,
        model: Any,
        parameters: Callable[[], Mapping[str, nn.Parameter]],
        sizes: Sequence[int],
        lengths: Sequence[int],
        batch_size: int,
        run: RunFolder,
        parts: Sequence[nn.Module] = (),
        processes: Processes | None = None,
    ) -> None:
        self.recipe, self.seed, self.model, self.run = config, seed, model, run
        self.processes = processes or Processes()
        self.whole = self.processes.enter(Whole(model, *parts), model.get_decoder())
        self.parameters = dict(parameters())
        self.sizes, self.lengths, self.batch_size = sizes, lengths, batch_size
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.steps_per_epoch = len(plan_batches(sizes, batch_size, seed, 0))
        self.num_steps = config.max_steps or max(1, math.ceil(config.epochs * self.steps_per_epoch))
        self.log: list[dict[str, float]] = []
        self.step = 0
        self.watch: Watch = lambda part, values, step: None

    @abstractmethod
    def terms(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Weighted terms of the loss on a batch of those examples, each a mean; their sum is minimised."""

    @abstractmethod
    def counts(self, chosen: Sequence[int]) -> dict[str, int]:
        """Of how many things each term is the mean."""

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do work on the weights; all processes must do as many forwards in it, of whatever sizes."""
        found = self.whole(work, *arguments)
        if self.processes.is_sharded and not torch.is_grad_enabled():
            self.whole.reshard()  # type: ignore[operator]  # else the next forward would see these weights, not stepped ones
        return found

    def shared_terms(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """This process's part of the terms of a batch; summed over the processes they are the means over the batch."""
        if self.processes.count == 1:
            return self.call(self.terms, chosen)
        share = self.processes.share(chosen, self.lengths)
        terms = self.call(self.terms, share or chosen[:1])  # one without a share does the forwards all the same
        mine, whole = self.counts(share), self.counts(chosen)
        return {name: value * (mine[name] / max(whole[name], 1)) for name, value in terms.items()}

    def fit(self) -> None:
        """Run all remaining steps."""
        self.begin()
        self.train_mode()
        is_first = self.processes.is_first
        with (
            open_watch(self.recipe.log_with, self.run, self.step, is_first) as self.watch,
            progress("train", self.num_steps, self.step, is_first, "steps") as advance,
        ):
            for chosen in self._batches():
                line = self.optimize(self.shared_terms(chosen))
                self.log.append(line)
                self.watch("train", {key: value for key, value in line.items() if key != "step"}, self.step)
                advance(1)
                self.after_step()
                count(tokens=sum(self.lengths[i] for i in chosen))
                if self.step % self.recipe.checkpoint_steps == 0:
                    self._save()
        self._save()
        self.model.eval()

    def begin(self) -> None:
        """What is done once before the first step: read the checkpoint, if there is one."""
        self._resume()

    def after_step(self) -> None:  # noqa: B027
        """What is looked at between two steps; `num_steps` may be lowered to stop here."""

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and texts that a checkpoint holds beside parameters and optimizer."""
        return {}, {}

    def restore_extra(self, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:  # noqa: B027
        """Take over what `extra_state` gave to the checkpoint."""

    def train_mode(self) -> None:
        """Dropout inside the LoRA only; the base model stays in eval mode."""
        for name, module in self.model.named_modules():
            module.training = "lora_dropout" in name
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _batches(self) -> Iterator[list[int]]:
        """Examples of every batch from the current step on; a plan of every epoch depends on (seed, epoch) alone.

        What is drawn while a batch is worked depends on (seed, step).
        """
        epoch, plan = -1, []
        while self.step < self.num_steps:
            wanted, place = divmod(self.step, self.steps_per_epoch)
            if wanted != epoch:
                epoch, plan = wanted, self._plan(wanted)
            self.seed_step()
            yield plan[place]

    def seed_step(self) -> None:
        """Dropout of a step depends on nothing before it; every process draws its own."""
        torch.manual_seed(self.seed * 1_000_003 + self.step + self.processes.index * 998_244_353)

    def _plan(self, epoch: int) -> list[list[int]]:
        plan = plan_batches(self.sizes, self.batch_size, self.seed, epoch)
        return (plan * 2)[: self.steps_per_epoch]  # every epoch has as many steps as the first

    def optimize(self, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """One optimizer step on the sum of some terms (over all processes, too); returns the line of the log."""
        rate = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.stack(list(terms.values())).sum()
        (total * self.processes.count).backward()  # gradients of processes are averaged
        torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        values = {"loss": float(total.detach())} | {name: float(value.detach()) for name, value in terms.items()}
        sums = self.processes.sum(values)
        if not math.isfinite(sums["loss"]):
            raise ModelError(
                f"the loss of step {self.step} is not finite (NaN or infinity); lower --learning-rate, or try --dtype float32."
            )
        return {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            **sums,
            "learning_rate": rate,
        }

    def _learning_rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth."""
        config = self.recipe
        warmup = max(1, int(config.warmup_ratio * self.num_steps))
        if self.step < warmup:
            return config.learning_rate * (self.step + 1) / warmup
        part = (self.step - warmup) / max(1, self.num_steps - warmup)
        return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * part)))

    def final(self, names: Sequence[str]) -> dict[str, float]:
        """Means of the log's columns over the last tenth of the run."""
        tail = self.log[-max(1, len(self.log) // 10) :]
        return {name: float(np.mean([line[name] for line in tail])) for name in names if name in tail[-1]}

    @property
    def num_trainable(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    def full_parameters(self) -> dict[str, Tensor]:
        """Copies of all that is trained, on the CPU; all processes must ask."""
        return {name: full(parameter) for name, parameter in self.parameters.items()}

    def _save(self) -> None:
        tensors = {f"parameter.{name}": value for name, value in self.full_parameters().items()}
        for index, name in enumerate(self.parameters):
            for key, value in self.optimizer.state_dict()["state"].get(index, {}).items():
                tensors[f"optimizer.{key}.{name}"] = full(value)
        extra, texts = self.extra_state()
        if not self.processes.is_first:
            return
        write_text(self.run.file(LOG), "".join(json.dumps(line) + "\n" for line in self.log))
        write_bytes(self.run.file(CHECKPOINT), save(tensors | extra, metadata={"step": str(self.step), **texts}))

    def _resume(self) -> None:
        path = self.run.file(CHECKPOINT)
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = file.metadata()
        self.step = int(texts["step"])
        state: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, (name, parameter) in enumerate(self.parameters.items()):
                parameter.copy_(like(tensors[f"parameter.{name}"], parameter))
                own = {key: tensors.get(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                state[index] = {
                    key: value if value.ndim == 0 else like(value, parameter)
                    for key, value in own.items()
                    if value is not None
                }
        options: dict[str, Any] = {"param_groups": self.optimizer.state_dict()["param_groups"]}
        self.optimizer.load_state_dict({"state": state, **options})
        if self.run.file(LOG).exists():
            self.log = [line for line in read_jsonl(self.run.file(LOG)) if line["step"] <= self.step]
        self.restore_extra(tensors, texts)

    def clear(self) -> None:
        """Remove the checkpoint; last of all, so that a run killed before is finished from it, not begun again."""
        self.run.file(CHECKPOINT).unlink(missing_ok=True)
