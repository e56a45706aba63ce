"""A study of the tokens that decide a wrong answer: where they are, whether they are slips, what a trigger would gain.

A wrong greedy answer is cut at a place and the SLM samples its end several times: as long as some are right nothing is lost.
The first token behind which none is is critical. It may stand right before the wrong one, where that is as good as certain; so
the oracle fires at the next one, too. Source: critical tokens, Lin et al. 2024 (arXiv 2411.19943); the place
is searched for by halves, which takes a loss for lasting.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from s2t.config import EvalConfig, build_config
from s2t.decode.opening import open_pair
from s2t.decode.pair import Pair
from s2t.decode.rollouts import continued, text_of
from s2t.decode.workload import open_task, requests_for
from s2t.files import read_json, write_json
from s2t.methods.strategies import build_strategy
from s2t.model.chat import decode_ids
from s2t.studies.lab import Chart, Findings, Lab, Series
from s2t.studies.slips import choices_of
from s2t.tasks.problems import Task

NUM_ROLLOUTS = 16
TRIGGERS = ("critical", "divergence", "entropy")
_NEAR = 1  # tokens that a slip may stand beside a critical token


def critical(lab: Lab) -> Findings:
    """Which token decides a wrong answer, found by sampling on from it: is it a slip, do triggers fire there, what is gained."""
    path = lab.folder / "critical.json"
    found = _found(lab)
    write_json(path, {problem: [one["step"], one["step"] + 1] for problem, one in found.items()})  # see above
    settings = {"calibration": str(lab.calibrated()), "critical": str(path)}
    names = [f"takeover@{name}" for name in TRIGGERS]
    summary = lab.evaluated("eval", ",".join(["greedy", *names, "llm"]), **settings)
    correct = {name: scores["accuracy"] for name, scores in summary["strategies"].items()}
    rows, bars = [], []
    for name in ("greedy", *names, "llm"):
        scores, test = summary["strategies"][name], summary["paired"].get(f"{name} vs greedy")
        fired = [one["fires"][name.partition("@")[2]] for one in found.values()] if "@" in name else []
        at = float(np.mean(fired)) if fired else None
        gain = (test["difference"], test["ci95"], test["p_holm"]) if test else (None, None, None)
        rows.append((name, scores["trigger_rate"], at, correct[name], scores["ci95"], *gain))
        bars.append(Series(name, [0.0], [correct[name]], [tuple(scores["ci95"])]))
    columns = (
        "strategy",
        "triggered %",
        "fires at critical tokens %",
        "accuracy %",
        "95 %",
        "gain, points %",
        "95 % of it",
        "p (Holm)",
    )
    slips = [one["is_slip"] for one in found.values()]
    share = f"{100 * np.mean(slips):.0f} %" if slips else "none"
    notes = [
        f"{len(found)} wrong greedy answers of {lab.config.limit} have a critical token, found with {NUM_ROLLOUTS} samples a "
        f"place; {share} of these tokens are slips (a written result that its left side does not give) or stand beside one.",
        "critical is an oracle: it knows the grade.",
    ]
    return Findings("Tokens that decide a wrong answer", columns, rows, Chart("", "accuracy (%)", bars, "bar"), notes)


def _found(lab: Lab) -> dict[str, dict[str, Any]]:
    """Critical tokens by problem, found once and kept."""
    path = lab.folder / "found.json"
    if not path.is_file():
        write_json(path, _search(lab))
    return read_json(path)


def _search(lab: Lab) -> dict[str, dict[str, Any]]:
    config = build_config(EvalConfig, flags=lab.settings({"strategies": "s2t", "limit": lab.config.limit}))
    pair, task = (
        open_pair(config, ["s2t"]),
        open_task(config, config.slm, config.revision),
    )
    problems = task.problems(lab.config.split, lab.config.limit, config.seed)
    requests = requests_for(pair, task, problems)
    done = pair.write(build_strategy("greedy", config, {}), requests, config.max_new_tokens)
    wrong = [i for i, s in enumerate(done) if not _is_right(pair, task, problems[i], s.token_ids)]
    search = _Search(pair, task, lab.config.max_new_tokens, lab.config.seed)
    places = search.places([(problems[i], list(requests[i].prompt_ids), done[i].token_ids) for i in wrong])
    labels = pair.label([requests[i] for i in wrong], [done[i].token_ids for i in wrong], 1)
    thresholds = lab.thresholds()
    found = {}
    for i, step, own in zip(wrong, places, labels, strict=True):
        if step is None:
            continue
        near = slice(max(step, config.warmup_steps), step + 2)  # where a trigger may fire
        fires = {name: bool((getattr(own, name)[near] > thresholds[name]).any()) for name in ("divergence", "entropy")}
        found[problems[i].problem_id] = {
            "step": step,
            "is_slip": any(abs(step - at) <= _NEAR for at in slips_of(pair, done[i].token_ids)),
            "fires": fires | {"critical": True},
        }
    return found


def slips_of(pair: Pair, ids: Sequence[int]) -> list[int]:
    """The tokens of an answer that write a result which its left side does not give."""
    texts = [decode_ids(pair.slm.tokenizer, [i]) for i in ids if i not in pair.stop_ids]
    choices = choices_of([{"text": text} for text in texts])
    return [place for place, choice in enumerate(choices) if choice.is_result and not choice.is_right]


def _is_right(pair: Pair, task: Task, problem: Any, ids: Sequence[int]) -> bool:
    return task.grade(problem, text_of(pair, ids)).is_correct


class _Search:
    """Halves the answers of all problems together, some samples for each at a time."""

    def __init__(self, pair: Pair, task: Task, limit: int, seed: int) -> None:
        self.pair, self.task, self.limit = pair, task, limit
        self.sampler = build_strategy("sample", EvalConfig(), {}, seed=seed)

    def places(self, answers: Sequence[tuple[Any, list[int], list[int]]]) -> list[int | None]:
        """For each (problem, prompt, wrong answer) its critical token; None where no beginning at all leads to a right end."""
        hopeful = self._hopeful(answers, [0] * len(answers))
        low, high = (
            [0] * len(answers),
            [len(ids) for _, _, ids in answers],
        )  # right ends behind low tokens, none behind high
        while any(high[i] - low[i] > 1 for i in range(len(answers)) if hopeful[i]):
            middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
            for i, is_hopeful in enumerate(self._hopeful(answers, middle)):
                if high[i] - low[i] > 1:
                    (low if is_hopeful else high)[i] = middle[i]
        return [low[i] if hopeful[i] else None for i in range(len(answers))]

    def _hopeful(self, answers: Sequence[tuple[Any, list[int], list[int]]], lengths: Sequence[int]) -> list[bool]:
        prompts = [prompt for _, prompt, _ in answers for _ in range(NUM_ROLLOUTS)]
        cut = [ids[:n] for (_, _, ids), n in zip(answers, lengths, strict=True) for _ in range(NUM_ROLLOUTS)]
        ends = continued(self.pair, self.sampler, prompts, cut, self.limit)
        right = [_is_right(self.pair, self.task, answers[i // NUM_ROLLOUTS][0], ids) for i, ids in enumerate(ends)]
        return [any(right[i * NUM_ROLLOUTS : (i + 1) * NUM_ROLLOUTS]) for i in range(len(answers))]
