"""`s2t train-router --method zip-rc`: graded samples of the SLM, and a head that foretells how they end and when.

Every 8th token of a sample, and its last, is an example: the state that it is predicted from, whether the sample is right, and
how many tokens were left. Source: ZIP-RC (arXiv 2512.01457), a head on a frozen model in the place of reserved logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2t.config import HOW_IT_RUNS, DecodeConfig, RouterConfig
from s2t.decode.opening import open_pair
from s2t.decode.rollouts import text_of
from s2t.decode.workload import open_task, requests_for, shard_workers, shards_of, task_for_workers
from s2t.errors import DataError
from s2t.files import RunFolder, read_json, write_json
from s2t.methods.forecast import EVERY
from s2t.methods.strategies import build_strategy
from s2t.model.forecast import EDGES, ForecastConfig, ForecastHead, length_bin, save_forecast
from s2t.model.load import load_model
from s2t.model.loaded import LoadedModel
from s2t.progress import counted_as
from s2t.records import Problem
from s2t.scale import Shard, to_files, write_missing
from s2t.tasks.problems import Task
from s2t.train.small import fit, states_of

_HELD = 10  # one problem in so many is kept to measure the head on


def train_forecast(config: RouterConfig) -> dict[str, Any]:
    """Write and grade samples, train the head, and measure it on held-out problems; router-run.json. Rerunning goes on."""
    run = RunFolder.open(config.out, "train-router", config, ignore=HOW_IT_RUNS)
    task = open_task(config, config.slm, config.revision)
    problems = task.problems("train", config.limit, config.seed)
    shards = to_files(shards_of(problems, config.shard_size), partial(run.shard, "samples", suffix="json"))
    with shard_workers(partial(_Sampler, config, task_for_workers(task, config)), config) as workers:
        write_missing(workers, _Sampler.shard, shards, write_json, "samples")
    rows = [row for path in run.shards("samples", "json") for row in read_json(path)]
    held = rows[::_HELD] if len(rows) > 1 else []
    kept = [row for place, row in enumerate(rows) if place % _HELD or not held]
    if not any(mark for row in kept for _, mark in row["samples"]):
        raise DataError("none of the samples is right, so there is nothing to foretell; raise --limit.")
    slm = load_model(config.slm, **config.load_options)
    head = _fit(config, slm, kept)
    save_forecast(head, Path(config.out) / "forecast")
    found = {
        "forecast": str(Path(config.out) / "forecast"),
        "num_problems": len(rows),
        "num_samples": sum(len(row["samples"]) for row in rows),
        "right_rate": float(np.mean([mark for row in rows for _, mark in row["samples"]])),
        "heldout_auc": _auc(head, slm, held),
    }
    write_json(run.file("router-run.json"), found)
    run.finish()
    return found


class _Sampler:
    """Writes and grades samples of a shard of problems."""

    def __init__(self, config: RouterConfig, task: Task | None) -> None:
        self.config, self.task = config, task or open_task(config, config.slm, config.revision)
        self.pair = open_pair(config, ["sample"])
        how = DecodeConfig(temperature=config.temperature, top_p=config.top_p)
        self.writer = build_strategy("sample", how, {}, seed=config.seed)

    def shard(self, shard: Shard[Problem]) -> list[dict[str, Any]]:
        """Per problem: prompt, and the tokens of each sample with whether it is right."""
        count = self.config.num_samples
        requests = requests_for(self.pair, self.task, shard.items, count)
        with counted_as(1 / count):
            done = self.pair.write(self.writer, requests, self.config.max_new_tokens)
        found = []
        for place, problem in enumerate(shard.items):
            own = [one.token_ids for one in done[place * count : (place + 1) * count]]
            marks = [self.task.grade(problem, text_of(self.pair, ids)).is_correct for ids in own]
            pairs = list(zip(own, marks, strict=True))
            found.append({"prompt_ids": list(requests[place * count].prompt_ids), "samples": pairs})
        return found


def _examples(slm: LoadedModel, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """States [n, H] at every 8th token and the last, whether the sample is right [n], and the tokens left [n]."""
    answers = [(row["prompt_ids"], tokens) for row in rows for tokens, _ in row["samples"]]
    marks = [mark for row in rows for _, mark in row["samples"]]
    parts, right, left = [], [], []
    for states, mark in zip(states_of(slm, answers), marks, strict=True):
        places = sorted({*range(0, len(states), EVERY), len(states) - 1})
        parts.append(states[places].float().cpu().clone())
        right += [mark] * len(places)
        left += [len(states) - place for place in places]
    return torch.cat(parts), torch.tensor(right), torch.tensor(left)


def _fit(config: RouterConfig, slm: LoadedModel, rows: Sequence[dict[str, Any]]) -> ForecastHead:
    states, right, left = _examples(slm, rows)
    bins = torch.tensor([length_bin(count) for count in left.tolist()])
    size = len(EDGES) + 1
    middles = [EDGES[0] / 2, *((a + b) / 2 for a, b in pairwise(EDGES)), 1.5 * EDGES[-1]]
    lengths = [float(left[bins == i].float().mean()) if bool((bins == i).any()) else middles[i] for i in range(size)]
    torch.manual_seed(config.seed)
    head = ForecastHead(ForecastConfig(slm.name, states.shape[1], tuple(lengths)))
    classes = right.long() * size + bins
    loss = torch.nn.functional.cross_entropy
    rng = np.random.default_rng(config.seed)
    fit(head, lambda batch: loss(head(states[batch]), classes[batch]), len(classes), config.num_steps, rng)
    return head


def _auc(head: ForecastHead, slm: LoadedModel, rows: Sequence[dict[str, Any]]) -> float | None:
    """Area under the ROC of P(right) at all examples of some problems; None where all are alike."""
    if not rows:
        return None
    states, right, _ = _examples(slm, rows)
    if right.all() or not right.any():
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(right.numpy(), head.read(states)[:, 1].sum(-1).numpy()))
