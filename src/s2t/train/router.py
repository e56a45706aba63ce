"""`s2t train-router`: where the SLM's token would part an answer from the LLM's path for good, and a router that foresees it.

The LLM writes; wherever the SLM's greedy token is another one, the LLM goes on from that token, and the two parted if the final
answers differ. Source: R2R (arXiv 2505.21600), with final answers in the place of a judge. Shards of problems resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2t.config import HOW_IT_RUNS, DecodeConfig, RouterConfig
from s2t.core.calibration import threshold_at
from s2t.decode.opening import open_pair
from s2t.decode.pair import Pair
from s2t.decode.rollouts import continued, text_of
from s2t.decode.workload import open_task, requests_for, shard_workers, shards_of, task_for_workers
from s2t.errors import DataError, ModelError
from s2t.files import RunFolder, read_json, write_json
from s2t.methods.strategies import build_strategy
from s2t.model.engine import Engine
from s2t.model.load import load_model
from s2t.model.loaded import LoadedModel
from s2t.model.router import Router, features, save_router
from s2t.model.router import RouterConfig as RouterShape
from s2t.progress import counted_as
from s2t.records import Problem
from s2t.scale import Shard, to_files, write_missing
from s2t.tasks.problems import Task
from s2t.train.small import fit, states_of

_NEGATIVES = 20  # kept steps for each step that parts
_WIDTH = 64


def train_router(config: RouterConfig) -> dict[str, Any]:
    """Find partings, train the router and put its threshold at the target rate on the calibration split; router-run.json."""
    run = RunFolder.open(config.out, "train-router", config, ignore=HOW_IT_RUNS)
    task = open_task(config, config.slm, config.revision)
    problems = task.problems("train", config.limit, config.seed)
    shards = to_files(shards_of(problems, config.shard_size), partial(run.shard, "partings", suffix="json"))
    with shard_workers(partial(_Parter, config, task_for_workers(task, config)), config) as workers:
        write_missing(workers, _Parter.shard, shards, write_json, "partings")
    paths = [path for row in (read_json(path) for path in run.shards("partings", "json")) for path in row]
    parted = sum(mark for path in paths for _, mark in path["places"])
    if not parted:
        raise DataError("no token of the SLM parted an answer from the LLM's; raise --limit or --max-partings.")
    slm = load_model(config.slm, **config.load_options)
    router = _fit(config, slm, paths)
    threshold, rate = threshold_at(_readings(config, slm, router, task), 1 - config.target_rate)
    router.config = replace(router.config, threshold=threshold)
    save_router(router, Path(config.out) / "router")
    found = {
        "router": str(Path(config.out) / "router"),
        "num_problems": len(paths),
        "num_differences": sum(len(path["places"]) for path in paths),
        "num_parted": parted,
        "threshold": threshold,
        "trigger_rate": rate,
    }
    write_json(run.file("router-run.json"), found)
    run.finish()
    return found


class _Parter:
    """Finds the partings of a shard of problems."""

    def __init__(self, config: RouterConfig, task: Task | None) -> None:
        self.config, self.task = config, task or open_task(config, config.slm, config.revision)
        self.pair = open_pair(config, ["llm", "takeover"])
        self.pair.local_llm()
        if self.pair.vocabulary is not None:
            raise ModelError(
                f"a router learns where tokens part, and {config.slm} and {config.llm} have different tokenizers; use a pair "
                "that shares its tokenizer."
            )
        self.writer = build_strategy("llm", DecodeConfig(), {})

    def shard(self, shard: Shard[Problem]) -> list[dict[str, Any]]:
        """Per problem: prompt, the LLM's answer, and the places where the SLM differs with whether it parted there."""
        pair, limit = self.pair, self.config.max_new_tokens
        requests = requests_for(pair, self.task, shard.items)
        answers = [done.token_ids for done in pair.write(self.writer, requests, limit)]
        prompts = [list(request.prompt_ids) for request in requests]
        with counted_as(0):  # a problem is done once, whatever is tried on it
            labels = pair.label(requests, answers, 1)
        places = [_spread(np.flatnonzero(own.rank > 0), self.config.max_partings) for own in labels]
        asked = [(i, step) for i, own in enumerate(places) for step in own]
        prefixes = [[*answers[i][:step], int(labels[i].candidate_ids[step, 0])] for i, step in asked]
        with counted_as(0):
            ended = continued(pair, self.writer, [prompts[i] for i, _ in asked], prefixes, limit)
        finals = [self._final(shard.items[i], ids) for i, ids in enumerate(answers)]
        marks = [self._final(shard.items[i], ids) != finals[i] for (i, _), ids in zip(asked, ended, strict=True)]
        found = [{"prompt_ids": p, "token_ids": a, "places": []} for p, a in zip(prompts, answers, strict=True)]
        for (i, step), mark in zip(asked, marks, strict=True):
            found[i]["places"].append([step, bool(mark)])
        return found

    def _final(self, problem: Problem, ids: Sequence[int]) -> str | None:
        return self.task.canonical(self.task.grade(problem, text_of(self.pair, ids)).extracted)


def _spread(places: np.ndarray, most: int) -> list[int]:
    """At most so many places, evenly spread, the first one among them."""
    return [int(places[i]) for i in np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)]


def _fit(config: RouterConfig, slm: LoadedModel, paths: Sequence[dict[str, Any]]) -> Router:
    """Train on all steps that part and on so many others, drawn once; the same seed gives the same router."""
    rng = np.random.default_rng(config.seed)
    rows, marks = [], []
    answers = [(path["prompt_ids"], path["token_ids"]) for path in paths]
    for path, states in zip(paths, states_of(slm, answers), strict=True):
        parted = {step for step, mark in path["places"] if mark}
        others = [step for step in range(len(states)) if step not in parted]
        kept = rng.permutation(others)[: _NEGATIVES * max(1, len(parted))]
        chosen = [*parted, *map(int, kept)]
        rows.append(_inputs(slm, states[chosen]))
        marks += [step in parted for step in chosen]
    inputs, truth = torch.cat(rows), torch.tensor(marks, dtype=torch.float32)
    torch.manual_seed(config.seed)
    hidden = (inputs.shape[1] - RouterShape("", 0).num_logits) // 2
    router = Router(RouterShape(slm.name, hidden, width=_WIDTH))
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(1 - truth).sum() / truth.sum())
    fit(router, lambda batch: loss(router(inputs[batch]), truth[batch]), len(truth), config.num_steps, rng)
    return router


@torch.inference_mode()
def _inputs(slm: LoadedModel, states: Tensor) -> Tensor:
    """What the router reads at some steps; [n, H] -> [n, F]."""
    logits = Engine(slm, 1).logits(states)
    return features(states, slm.model.get_input_embeddings()(logits.argmax(-1)), logits).cpu().clone()


def _readings(config: RouterConfig, slm: LoadedModel, router: Router, task: Task) -> np.ndarray:
    """The router's readings along the SLM's own answers to calibration problems."""
    pair = Pair(slm, batch_size=config.batch_size, variables=config.template_variables)
    requests = requests_for(pair, task, task.problems("calibration", config.calibration_limit, config.seed))
    done = pair.write(build_strategy("greedy", DecodeConfig(), {}), requests, config.max_new_tokens)
    answers = [(request.prompt_ids, sequence.token_ids) for request, sequence in zip(requests, done, strict=True)]
    with torch.inference_mode():
        parts = [
            router(_inputs(slm, states[config.warmup_steps :])).sigmoid()
            for states in states_of(slm, answers)
            if len(states) > config.warmup_steps
        ]
    return torch.cat(parts).numpy() if parts else np.empty(0)
