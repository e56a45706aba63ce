"""Distillation as everybody does it, to compare selection with: one LoRA of the SLM, fitted to the LLM.

Three methods share the problems, the LoRA and the steps of `s2t train`: cross-entropy on the LLM's answers (`sft`), KL to
the LLM on them (`kd`), and KL on the SLM's own answers (`on-policy-kd`). What comes out is an ordinary PEFT adapter.
Sources: knowledge distillation, arXiv 1503.02531; on answers of the LLM, arXiv 1606.07947; on the SLM's own, arXiv 2306.13649.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from s2t.config import PLACES, DistillConfig
from s2t.core.losses import distillation_kl
from s2t.decode.workload import open_task, problems_outside
from s2t.errors import ConfigError
from s2t.files import RunFolder, read_json, versions, write_json
from s2t.model.load import load_model
from s2t.model.loaded import Head, LoadedModel
from s2t.model.lora import (
    DISTILL_CONFIG,
    find_lora,
    lora_parameters,
    new_lora,
    save_lora,
    trained_in_half,
    tuner_layers,
)
from s2t.model.merged import PROBLEMS_FILE, base_model
from s2t.model.tiny import is_embedded
from s2t.tasks.problems import heldout_templates
from s2t.train.answers import TrainingAnswer, read_answers, write_answers
from s2t.train.dataset import pad_ids
from s2t.train.fit import Fit
from s2t.train.forward import sum_in_chunks
from s2t.train.processes import Processes, open_processes
from s2t.train.watch import check_tracker


def distill(config: DistillConfig) -> dict[str, Any]:
    """Distil the LLM into a LoRA and return distill.json; same command again: resumes, or returns the finished run."""
    _check_plain(config)
    check_tracker(config.log_with)
    with open_processes(config.device) as processes:
        return _distill(config, processes)


def _distill(config: DistillConfig, processes: Processes) -> dict[str, Any]:
    run = processes.open_run(config.out, "distill", config, (*PLACES, "log_with"))
    if run.is_complete:
        return read_json(run.file("distill.json"))
    task = open_task(config, config.slm, config.revision)
    heldout = heldout_templates(task.templates(), config.heldout_templates)
    problems = problems_outside(task, config.split, config.limit, config.seed, heldout)
    write_answers(config, run, task, problems, processes)
    answers = read_answers(run)
    torch.manual_seed(config.seed)
    distiller = Distiller(config, answers, load_model(config.slm, **processes.load_options(config)), run, processes)
    distiller.fit()
    result = {"num_problems": len(problems), **distiller.summary(), "heldout_templates": sorted(heldout)}
    weights = distiller.full_parameters()
    if not processes.is_first:
        return result
    distiller.save(result, weights)
    write_json(run.file("distill.json"), result)
    run.finish()
    distiller.clear()
    return result


def _check_plain(config: DistillConfig) -> None:
    """Raise ConfigError where the SLM is an adapter or a merged model: a LoRA names one base, which others can load."""
    base = base_model(config.slm, config.revision)
    if base == config.slm and not is_embedded(base):
        with suppress(OSError):  # of a model that is not there, which loading says in its own words
            lora = find_lora(config.slm, config.revision)
            base = lora.base if lora is not None else base
    if base != config.slm:
        raise ConfigError(f"distill trains a model, and {config.slm} is made from {base}; pass --slm {base}.")


class Distiller(Fit):
    """One training run over fixed answers; the LoRA acts on every token."""

    def __init__(
        self,
        config: DistillConfig,
        answers: Sequence[TrainingAnswer],
        loaded: LoadedModel,
        run: RunFolder,
        processes: Processes | None = None,
    ) -> None:
        self.peft_model = new_lora(loaded.model, config.lora_rank, config.lora_alpha, config.lora_dropout)
        self.base_model: Any = self.peft_model.get_base_model()
        self.layers = tuner_layers(self.base_model)
        super().__init__(
            config,
            config.seed,
            self.base_model,
            partial(lora_parameters, self.base_model),
            [1] * len(answers),
            [len(answer.ids) for answer in answers],
            config.batch_answers,
            run,
            processes=processes,
        )
        self.config, self.answers, self.device = config, answers, loaded.device
        self.head = Head(self.base_model)

    def terms(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The loss on those answers, mean over their tokens, nats."""
        batch = [self.answers[i] for i in chosen]
        states = self._states(batch)  # [N, H]
        if self.config.method == "sft":
            wanted = (self._stack([answer.token_ids for answer in batch]).long(),)
            return {"ce": sum_in_chunks(self._cross_entropy, self.head, states, *wanted) / len(states)}
        ids = self._stack([answer.target_ids for answer in batch]).long()
        probs = self._stack([answer.target_probs for answer in batch])
        return {"kl": sum_in_chunks(self._kl, self.head, states, ids, probs) / len(states)}

    def counts(self, chosen: Sequence[int]) -> dict[str, int]:
        """Both terms are means over tokens."""
        tokens = sum(len(self.answers[i].token_ids) for i in chosen)
        return {"ce": tokens, "kl": tokens}

    def _states(self, batch: Sequence[TrainingAnswer]) -> Tensor:
        """Last hidden states that the tokens of all answers are predicted from, answer by answer; [N, H]."""
        found: dict[int, Tensor] = {}
        lengths = [len(answer.ids) for answer in batch]
        # one forward: as many for every process, and a GPU waits for launches more than for padding
        is_one = self.processes.is_sharded or self.device.type != "cpu"
        groups = [list(range(len(batch)))] if is_one else _similar(lengths)
        for group in groups:
            padded = pad_ids([batch[i] for i in group]).to(
                self.device
            )  # on the right, where no token of an answer looks
            with trained_in_half(self.base_model, self.layers):
                hidden = self.base_model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state
            for row, i in enumerate(group):
                found[i] = hidden[row, len(batch[i].prompt_ids) - 1 : len(batch[i].ids)]
        return torch.cat([found[i] for i in range(len(batch))])

    def _stack(self, parts: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(self.device)

    def _cross_entropy(self, states: Tensor, token_ids: Tensor) -> Tensor:
        return F.cross_entropy(self.head(states), token_ids, reduction="sum")

    def _kl(self, states: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
        return distillation_kl(self.head(states), ids, probs, self.config.kd_temperature)

    def summary(self) -> dict[str, Any]:
        """Counts, and the loss over the last tenth of the run."""
        return {
            "num_answers": len(self.answers),
            "num_tokens": sum(len(answer.token_ids) for answer in self.answers),
            "num_steps": self.num_steps,
            "num_trainable": self.num_trainable,
            "final": self.final(("loss", "ce", "kl")),
        }

    def save(self, result: dict[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Write the adapter folder: PEFT's two files, where it comes from, its problems' hashes and a model card."""
        config = self.config
        hashes = sorted({answer.problem_id.rsplit("-", 1)[-1] for answer in self.answers})
        record = {
            **{name: getattr(config, name) for name in _RECORDED},
            "base_model": config.slm,
            "heldout_templates": result["heldout_templates"],
            "num_answers": result["num_answers"],
            "num_steps": result["num_steps"],
            "problems_digest": hashlib.blake2b("\n".join(hashes).encode(), digest_size=16).hexdigest(),
            "versions": versions(),
        }
        texts = {
            PROBLEMS_FILE: "".join(f"{item}\n" for item in hashes),
            DISTILL_CONFIG: json.dumps(record, indent=2) + "\n",
            "README.md": _card(record),
        }
        save_lora(self.peft_model, self.run.file("adapter"), config.slm, config.revision, texts, weights)


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Indices by length, cut where padding would take more than an eighth beside the tokens."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if groups:
            wider = [*groups[-1], i]
            if 8 * lengths[i] * len(wider) <= 9 * sum(lengths[k] for k in wider):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


_RECORDED = (
    *("method", "llm", "task", "split", "seed", "only_correct", "policy", "kd_temperature", "support_size"),
    *("lora_rank", "lora_alpha", "lora_dropout", "learning_rate", "batch_answers"),
)


def _card(record: dict[str, Any]) -> str:
    rows = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in record.items() if value is not None)
    front = (
        f"---\nlibrary_name: peft\nbase_model: {json.dumps(record['base_model'])}\ntags: [lora, distillation]\n---\n\n"
    )
    return (
        f"{front}# {record['base_model']}, distilled from {record['llm']}\n\n"
        "An ordinary LoRA, written by `s2t distill`: `--slm FOLDER` loads it merged into its base, and so does "
        "`PeftModel.from_pretrained(base, FOLDER)`.\n\n"
        f"| setting | value |\n| --- | --- |\n{rows}\n"
    )
