"""The report's first lines: sentences that say what came out and no more than that, and an answer that was repaired."""

from __future__ import annotations

import json
from typing import Any

import pytest

from s2t.report.lead import Part, repaired, sentences
from s2t.report.trace import Traces, load_traces


def scores(accuracy: float, slm: int = 1000, llm: int = 0) -> dict[str, Any]:
    return {"accuracy": accuracy, "ci95": [accuracy - 0.1, accuracy + 0.1], "slm_forwards": slm, "llm_forwards": llm}


def summary(names: dict[str, dict[str, Any]], **paired: Any) -> dict[str, Any]:
    return {"num_test": 1200, "strategies": names, "paired": paired}


def against(difference: float, p: float) -> dict[str, Any]:
    return {"difference": difference, "ci95": [difference - 0.05, difference + 0.05], "p_value": 0.0, "p_holm": p}


def said(*given: Any) -> str:
    return " ".join(sentences(*given)).replace("\N{NO-BREAK SPACE}", " ")


def test_a_gain_is_said_with_its_interval_and_cost():
    found = summary(
        {"greedy": scores(0.5), "s2t-local": scores(0.6, 1010)}, **{"s2t-local vs greedy": against(0.1, 0.01)}
    )
    assert said(found, None) == (
        "On 1,200 test problems s2t-local gets 60.0 % right, greedy 50.0 %: 10.0 points more (95 % interval 5.0 to 15.0 points). "
        "It needs no LLM, and 1.01 times the SLM forwards of greedy."
    )


@pytest.mark.parametrize(
    ("difference", "p", "words"),
    [
        (0.02, 0.4, "2.0 points more (95 % interval −3.0 to 7.0 points), which may be chance (p = 0.40)."),
        (-0.08, 0.001, "8.0 points fewer (95 % interval −13.0 to −3.0 points)."),
        (0.0, 1.0, "no difference (95 % interval −5.0 to 5.0 points)."),
        (0.0001, 1.0, "no difference"),
    ],
)
def test_what_may_be_chance_is_called_so(difference, p, words):
    found = summary(
        {"greedy": scores(0.5), "s2t": scores(0.5 + difference)}, **{"s2t vs greedy": against(difference, p)}
    )
    assert words in said(found, None)


def test_a_strategy_that_asks_the_llm_says_so():
    found = summary({"greedy": scores(0.5), "takeover": scores(0.9, 1100, 3456)})
    assert "It asks the LLM: 3,456 forwards, beside 1.10 times the SLM forwards of greedy." in said(found, None)


def test_the_way_to_s2t_and_the_hit_rate_are_there_where_they_are_known():
    names = {"greedy": scores(0.4), "s2t": scores(0.9, llm=10), "s2t-local": scores(0.6)}
    whole = said(summary(names) | {"gap_closed": 0.4, "sufficiency": {"hit_rate": {"8": 0.958}}}, None)
    assert "With the LLM at hand, s2t gets 90.0 % right; s2t-local goes 40 % of that way." in whole
    assert "At 95.8 % of the divergence points the LLM's token is among the SLM's first eight." in whole
    assert "90.1 %" in said(summary(names), {"hit_rate": {"8": 0.901}})
    assert "divergence" not in said(summary(names), {"hit_rate": {"1": 0.9}})


@pytest.mark.parametrize("name", ["greedy", "llm"])
def test_a_run_of_one_strategy_has_its_accuracy(name):
    assert said(summary({name: scores(0.5)}), None) == (
        f"On 1,200 test problems {name} gets 50.0 % right (95 % interval 40.0 to 60.0 %)."
    )


# One answer


def line(
    problem: str, strategy: str, tokens: list[str], is_correct: bool, flips: dict[int, str] | None = None
) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"token_id": sum(map(ord, token)), "text": token} for token in tokens]
    for step, greedy in (flips or {}).items():
        offered = [(greedy, 0.5), (tokens[step], 0.4), *((f" {rank}", 0.01) for rank in range(6))]
        candidates = [
            {
                "id": sum(map(ord, text)),
                "text": text,
                "slm_prob": p,
                "llm_prob": None,
                "score": None,
                "selected": i == 1,
            }
            for i, (text, p) in enumerate(offered)
        ]
        steps[step] |= {"fired": True, "flip": True, "greedy_id": 1, "greedy_text": greedy, "candidates": candidates}
    text = {"question": f"{problem}?", "gold": "5", "prompt_text": "", "extracted": tokens[-1].strip()}
    return {"problem_id": problem, "strategy": strategy, "is_correct": is_correct, "steps": steps} | text


def packed(tmp_path, lines: list[dict[str, Any]]) -> Traces:
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    found = load_traces(path, {})
    assert found is not None
    return found


WRONG, RIGHT = ["2", " + 3", " =", " 4"], ["2", " + 3", " =", " 5"]


def test_the_repaired_answer_shows_its_flip_and_what_was_offered(tmp_path):
    lines = [line("a", "greedy", WRONG, False), line("a", "s2t-local", RIGHT, True, {3: " 4"})]
    found = repaired(packed(tmp_path, lines))
    assert found is not None
    assert (found.strategy, found.question, found.gold) == ("s2t-local", "a?", "5")
    assert (found.greedy_answer, found.answer) == ("4", "5")
    assert found.greedy == [Part("2 + 3 ="), Part(" 4", "turn")]
    assert found.repaired == [Part("2 + 3 ="), Part(" 5", "flip", " 4")]
    assert found.offered[:2] == [(" 4", "50.0 %", False), (" 5", "40.0 %", True)]
    assert len(found.offered) == 5


def test_the_plainest_example_is_taken_and_the_adapter_goes_first(tmp_path):
    longer = [*RIGHT[:3], " 2", " + 3", " =", " 5"]
    lines = [line(name, "greedy", WRONG, False) for name in "abc"]
    lines += [
        line("a", "s2t-local", longer, True, {3: " 4"}),
        line("b", "s2t-local", RIGHT, True, {3: " 4"}),
        line("c", "s2t-local", RIGHT, True, {2: ":", 3: " 4"}),
    ]
    lines += [line("a", "s2t", RIGHT[1:], True, {0: "x"})]
    found = repaired(packed(tmp_path, lines))
    assert found is not None
    assert (found.strategy, found.question) == ("s2t-local", "b?")


@pytest.mark.parametrize(
    "other",
    [
        line("a", "s2t-local", RIGHT, True),  # right without a flip
        line("a", "s2t-local", WRONG, False, {3: " 5"}),
        line("b", "s2t-local", RIGHT, True, {3: " 4"}),  # of a problem that greedy gets right
    ],
)
def test_without_a_repair_there_is_no_example(other, tmp_path):
    lines = [line("a", "greedy", WRONG, False), line("b", "greedy", RIGHT, True), other]
    assert repaired(packed(tmp_path, lines)) is None


def test_without_greedy_or_traces_there_is_no_example(tmp_path):
    assert repaired(None) is None
    assert repaired(packed(tmp_path, [line("a", "s2t", RIGHT, True, {3: " 4"})])) is None


def test_a_long_answer_is_cut_around_the_flip(tmp_path):
    long = [f" w{i}" for i in range(500)]
    flipped = [*long[:300], " right", *long[301:]]
    lines = [line("a", "greedy", long, False), line("a", "s2t", flipped, True, {300: " w300"})]
    found = repaired(packed(tmp_path, lines))
    assert found is not None
    before, flip, after = found.repaired
    assert flip == Part(" right", "flip", " w300")
    assert before.text.startswith("… w220") and after.text.endswith("w419…")
    assert [part.text for part in found.greedy][1] == " w300"


def test_an_answer_that_only_goes_on_where_greedy_stops_has_no_turn(tmp_path):
    lines = [line("a", "greedy", WRONG[:3], False), line("a", "s2t", RIGHT, True, {3: "<end>"})]
    found = repaired(packed(tmp_path, lines))
    assert found is not None
    assert found.greedy == [Part("2 + 3 =")]
