"""Every method beside ours, held to the same laws: its two extremes, batches, costs."""

from __future__ import annotations

import math
import re

import pytest

from s2t.config import OVER_ANSWERS, WRITERS, needs_of
from s2t.tasks import canonical_answer

TOP_1 = {"top_k": 1}
CRITICALITY = {"trigger": "criticality", "scope": "step"}
AT_RANDOM = {"trigger": "random", "threshold": 0.5}
NEVER_OR_ALWAYS = {
    "speculative (1 keeps all)": ("speculative", {"threshold": 1.0}, "sample", {}),
    "speculative (greedy)": ("speculative", TOP_1, "llm", {}),
    "r2r never": ("r2r", {"threshold": 1.0}, "greedy", {}),
    "r2r always": ("r2r", {"threshold": -1.0, "warmup_steps": 0}, "llm", {}),
    "specreason 0": ("specreason", {"threshold": 0.0}, "greedy", {}),
    "specreason 10": ("specreason", {"threshold": 10.0}, "llm", {}),
    "specreason 10, short spans": ("specreason", {"threshold": 10.0, "span_tokens": 3}, "llm", {}),
    "smart 0": ("smart", {"threshold": 0.0}, "greedy", {}),
    "smart 2": ("smart", {"threshold": 2.0}, "llm", {}),
    "glimprouter never": ("glimprouter", {"threshold": 1e9}, "greedy", {}),
    "glimprouter always": ("glimprouter", {"threshold": -1.0}, "llm", {}),
    "relay, no call": ("relay", {}, "greedy", {}),
    "relay, a call without end": ("relay", {"calls_for": 99}, "llm", {"behind": 1}),
    "contrastive 1": ("contrastive", {"threshold": 1.0}, "llm", {}),
    "context-aware 0": ("context-aware", {"threshold": 0.0}, "greedy", {}),
    "dola 1": ("dola", {"threshold": 1.0}, "greedy", {}),
    "multiplex 1": ("multiplex", {"num_candidates": 1}, "sample", {}),
    "confidence": ("confidence", {}, "greedy", {}),
    "forecast": ("forecast", {}, "sample", {}),
    "takeover@criticality never": ("takeover", CRITICALITY | {"threshold": 1.0}, "greedy", {}),
    "takeover@criticality always": ("takeover", CRITICALITY | {"threshold": -1.0, "warmup_steps": 0}, "llm", {}),
    "s2t@criticality never": ("s2t", CRITICALITY | {"threshold": 1.0}, "greedy", {}),
    "s2t@criticality always, K = V": (
        "s2t",
        CRITICALITY | {"threshold": -1.0, "warmup_steps": 0, "num_candidates": 40},
        "llm",
        {},
    ),
    "released never, the SLM under its adapter": (
        "released",
        {"scope": "always", "threshold": 1e9},
        "s2t-local",
        {"scope": "always", "threshold": 1.0},
    ),
    "local-branch never": ("local-branch", {"scope": "candidates", "threshold": 1.0, "lookahead": 3}, "greedy", {}),
    "local-branch 0": (
        "local-branch",
        AT_RANDOM | {"scope": "step", "lookahead": 0},
        "s2t-local",
        AT_RANDOM | {"scope": "step"},
    ),
    "local-branch 1": (
        "local-branch",
        AT_RANDOM | {"scope": "candidates", "lookahead": 1},
        "s2t-local",
        AT_RANDOM | {"scope": "candidates"},
    ),
    "critical, none": ("takeover", {"trigger": "critical", "places": ()}, "greedy", {}),
    "critical, all": ("takeover", {"trigger": "critical", "places": range(99)}, "llm", {}),
    "takeover, a span to the end": (
        "takeover",
        {"trigger": "entropy", "threshold": -1.0, "span_tokens": 99, "warmup_steps": 0},
        "llm",
        {},
    ),
}
MIDDLE = {
    "speculative": {},
    "speculative hot": {"temperature": 1.3, "top_p": 1.0},
    "r2r": {"threshold": 0.5},
    "specreason": {"threshold": 4.0, "span_tokens": 5},
    "smart": {"threshold": 0.55, "span_tokens": 5},
    "glimprouter": {"threshold": 0.3, "step_end": "w4", "span_tokens": 5},
    "contrastive": {},
    "context-aware": {},
    "dola": {},
    "multiplex": {"temperature": 1.5},
    "takeover span": {"trigger": "entropy", "threshold": 1.2, "span_tokens": 4},
    "s2t span": {"trigger": "random", "threshold": 0.1, "span_tokens": 3},
    "relay": {"call": r"w(\d)$"},
    "takeover@criticality": CRITICALITY | {"threshold": 0.5},
    "s2t@criticality": CRITICALITY | {"threshold": 0.5},
    "released": {"scope": "always", "threshold": 1.0, "divergence": "released-code"},
    "local-branch, bins 2": AT_RANDOM | {"scope": "candidates", "lookahead": 2},
    "local-branch, bins always 3": AT_RANDOM | {"scope": "always", "lookahead": 3},
    "local-branch, rank 4": AT_RANDOM | {"scope": "step", "lookahead": 4},
    "takeover, critical": {"trigger": "critical", "places": (2, 3, 9)},
    "forecast": {"temperature": 1.5},
}
AMONG_ANSWERS = {
    "cascade, never": ("cascade", -math.inf, "confidence"),
    "cascade, always": ("cascade", math.inf, "llm"),
    "frugalgpt, never": ("frugalgpt", -math.inf, "confidence"),
    "frugalgpt, always": ("frugalgpt", math.inf, "llm"),
    "knn-routing, never": ("knn-routing", math.inf, "confidence"),
    "knn-routing, always": ("knn-routing", -math.inf, "llm"),
    "borda of equal weights": ("borda", 0.0, "self-consistency"),
    "zip-rc, tokens for nothing": ("zip-rc", 0.0, "self-consistency"),
    "zip-rc, tokens past all price": ("zip-rc", math.inf, "sample"),
}


def tokens(done):
    return [s.token_ids for s in done]


def method_of(name):
    """The strategy of an entry above."""
    return re.split("[@ ,]", name)[0]


def test_every_method_stands_in_the_tables():
    plain = {"greedy", "sample", "llm", "self-consistency", "self-certainty", "s2t-local"}
    for table in (NEVER_OR_ALWAYS, MIDDLE):
        missing = {*WRITERS} - plain - {method_of(name) for name in table}
        where = "MIDDLE" if table is MIDDLE else "NEVER_OR_ALWAYS"
        assert missing == ({"confidence"} if table is MIDDLE else set()), f"{where} has no line for {missing}"
    among = {name for name, _, _ in AMONG_ANSWERS.values()}
    assert {*OVER_ANSWERS} - among == {"deepconf"}, "deepconf's ends are in test_among_answers.py, by hand"


@pytest.mark.parametrize("extreme", [*NEVER_OR_ALWAYS, *AMONG_ANSWERS])
def test_at_each_end_of_its_threshold_a_method_is_one_of_the_plain_ones(extreme, request):
    """Token for token where it writes, answer for answer where it chooses among finished ones."""
    if extreme in NEVER_OR_ALWAYS:
        name, settings, plain, plain_settings = NEVER_OR_ALWAYS[extreme]
        rival = request.getfixturevalue("rival")
        found, wanted = (
            [(s.token_ids, s.finish_reason) for s in done]
            for done in (rival(name, **settings), rival(plain, **plain_settings))
        )
    else:
        name, threshold, plain = AMONG_ANSWERS[extreme]
        results = request.getfixturevalue("chosen")(threshold, name), request.getfixturevalue("answers")[1][plain]
        found, wanted = (
            [(r["problem_id"], r["is_correct"], canonical_answer(r["extracted"])) for r in rows] for rows in results
        )
    assert found == wanted


@pytest.mark.parametrize("name", MIDDLE)
def test_a_batch_writes_what_single_sequences_write_and_costs_the_same(name, rival):
    base = method_of(name)
    alone, together, few = (rival(base, batch_size=n, **MIDDLE[name]) for n in (1, 8, 3))
    facts = [[(s.token_ids, s.finish_reason, s.num_triggered, s.cost) for s in done] for done in (alone, together, few)]
    assert facts[0] == facts[1] == facts[2]


@pytest.mark.parametrize("name", MIDDLE)
def test_in_the_middle_a_method_is_neither_of_the_plain_ones(name, rival):
    found = tokens(rival(method_of(name), **MIDDLE[name]))
    assert found not in [tokens(rival(plain)) for plain in ("greedy", "sample", "llm")]


@pytest.mark.parametrize("name", MIDDLE)
def test_costs_add_up(name, rival, prompts):
    for sequence, prompt in zip(rival(method_of(name), **MIDDLE[name]), prompts, strict=True):
        cost = sequence.cost
        assert cost.generated == len(sequence.token_ids)
        assert cost.slm_processed >= len(prompt) + cost.generated - 1
        reads_llm = "llm" in needs_of(method_of(name), MIDDLE[name].get("trigger", "auto"))
        assert bool(cost.llm_flops) == bool(cost.llm_forwards) == bool(cost.llm_processed)
        assert reads_llm or not cost.llm_forwards
        if name == "context-aware":
            assert cost.slm_forwards > cost.generated
