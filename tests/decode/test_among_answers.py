"""Methods that choose among finished answers: at each end they are one of them, and what they cost adds up."""

from __future__ import annotations

import math

import pytest

from s2t.config import EvalConfig
from s2t.errors import ConfigError
from s2t.evaluate import evaluate
from s2t.methods.answers import Known
from s2t.methods.forecast import ZipRC, gain, stops
from s2t.methods.learned import FrugalGPT, NearestNeighbours
from s2t.methods.sample import vote
from s2t.methods.votes import Borda, DeepConf
from s2t.tasks import canonical_answer


def what(results):
    return [(r["problem_id"], r["text"], r["extracted"], r["is_correct"]) for r in results]


def costs(results):
    return [r["cost"] for r in results]


def test_samples_that_are_not_stopped_cost_what_all_samples_cost_and_stopped_ones_less(chosen, answers):
    assert costs(chosen(0.0, "zip-rc")) == costs(answers[1]["forecast"]) == costs(answers[1]["self-consistency"])
    for one, all_ in zip(chosen(5e-2, "zip-rc"), answers[1]["forecast"], strict=True):
        assert one["cost"]["generated"] < all_["cost"]["generated"]


def foretold(*rows):
    """Samples with 16 tokens and two decisions: (answer, P(right) at each), all to end within 8 tokens from there."""
    return [
        {"answer": a, "is_correct": a == "4", "tokens": 16, "expected": p[-1], "forecasts": [[1 - q, q] for q in p]}
        for a, p in rows
    ]


def test_a_sample_is_stopped_when_it_adds_less_than_its_tokens_cost():
    samples = foretold(("4", (0.5, 0.9)), ("3", (0.5, 0.1)), ("3", (0.5, 0.1)))
    assert stops(samples, [8.0], 0.0) == [16, 16, 16]
    assert stops(samples, [8.0], 0.012) == [16, 8, 8], (
        "0.096 for 8 tokens: 0.125 at first, then 0.1 and less of one in ten"
    )
    assert stops(samples, [8.0], 0.02) == [16, 8, 0], "0.16 for 8 tokens: of three that are as good the last one goes"
    whole = {"forecast": {"samples": samples, "cost": {"generated": 48, "slm_flops": 6.0}}}
    chooser = ZipRC.__new__(ZipRC)
    chooser.lengths, chooser.threshold = [8.0], 0.012
    found = chooser.choose("", whole)
    assert (found["extracted"], found["cost"]) == ("4", {"generated": 32, "slm_flops": 4.0})


def test_the_gain_of_going_on_is_that_of_the_best_limit_by_enumeration():
    joint, lengths, others, cost = [0.1, 0.2, 0.1, 0.05, 0.15, 0.4], [4.0, 12.0, 24.0], 0.7, 0.02
    pairs = [(length, right, joint[3 * right + i]) for right in (0, 1) for i, length in enumerate(lengths)]
    wanted = max(
        sum(p * (others * right * (length <= limit) - cost * min(length, limit)) for length, right, p in pairs)
        for limit in lengths
    )
    assert gain(joint, lengths, cost, others) == pytest.approx(wanted)


def test_at_minus_infinity_they_are_the_slm_and_at_infinity_the_llm_and_costs_add_up(chosen, answers):
    _, found, _ = answers
    slm, llm = found["confidence"], found["llm"]
    assert what(slm) == what(found["greedy"])
    assert all(r["value"] < 0 for r in slm)
    for name in ("cascade", "frugalgpt"):
        assert (what(chosen(-math.inf, name)), costs(chosen(-math.inf, name))) == (what(slm), costs(slm))
        assert what(chosen(math.inf, name)) == what(llm)
        for both, small, large in zip(chosen(math.inf, name), slm, llm, strict=True):
            assert both["cost"] == {k: small["cost"][k] + large["cost"][k] for k in small["cost"]}
            assert both["num_triggered"] == large["cost"]["generated"]
    routed = chosen(-math.inf, "knn-routing")
    assert (what(routed), costs(routed)) == (what(llm), costs(llm)), "the model that is not chosen costs nothing"
    assert what(chosen(math.inf, "knn-routing")) == what(slm)


def test_in_between_a_cascade_takes_some_of_each(chosen, answers):
    _, found, scores = answers
    values = sorted(r["value"] for r in found["confidence"])
    mixed = chosen(values[2], "cascade")
    assert sorted(bool(r["num_triggered"]) for r in mixed) == [False, False, True, True]
    rows = zip(mixed, found["confidence"], found["llm"], strict=True)
    assert all(one["text"] == (large if one["num_triggered"] else small)["text"] for one, small, large in rows)
    own = scores["cascade"]
    assert own["llm_tokens"] == sum(r["num_triggered"] for r in found["cascade"])
    assert own["llm_tokens"] + own["slm_tokens"] == sum(r["cost"]["generated"] for r in found["cascade"])


def test_a_vote_of_equal_weights_is_the_majority_and_one_that_never_stops_costs_all(chosen, answers):
    _, found, _ = answers
    voted, counted = chosen(0.0, "borda"), found["self-consistency"]
    assert [r["is_correct"] for r in voted] == [r["is_correct"] for r in counted]
    assert [r["extracted"] for r in voted] == [canonical_answer(r["extracted"]) for r in counted]
    assert costs(chosen(2.0, "deepconf")) == costs(found["self-certainty"])
    early = chosen(0.0, "deepconf")
    assert all(
        one["cost"]["generated"] < all_["cost"]["generated"]
        for one, all_ in zip(early, chosen(2.0, "deepconf"), strict=True)
    )


def samples(*pairs):
    return {
        "self-certainty": {
            "samples": [{"answer": a, "certainty": c, "is_correct": a == "4", "tokens": 10} for a, c in pairs],
            "cost": {"generated": 10 * len(pairs), "slm_flops": 1.0 * len(pairs)},
        }
    }


def test_weighted_votes_by_hand():
    given = samples(("3", 1.0), ("3", 1.1), ("4", 5.0), (None, 9.0))
    assert vote(["3", "3", "4", None]) == "3"
    heavy = Borda(EvalConfig(threshold=2.0), {}, Known())  # ranks: None 16, "4" 9, "3" 4 + 1
    assert heavy.choose("", given)["extracted"] == "4"
    assert Borda(EvalConfig(threshold=0.0), {}, Known()).choose("", given)["extracted"] == "3"
    sure = DeepConf(EvalConfig(threshold=9.0), {}, Known()).choose("", given)
    assert (sure["extracted"], sure["is_correct"], sure["cost"]["generated"]) == ("4", True, 40)
    equal = samples(("3", 1.0), ("3", 1.0), ("4", 1.0), ("4", 1.0), ("4", 1.0))
    assert DeepConf(EvalConfig(threshold=9.0), {}, Known()).choose("", equal)["extracted"] == "4", "the majority"
    stopped = DeepConf(EvalConfig(threshold=0.9), {}, Known()).choose("", given)
    assert (stopped["extracted"], stopped["cost"]["generated"]) == ("3", 20), "the first two agree"


def test_with_k_of_all_neighbours_every_question_goes_to_the_model_that_is_better_overall():
    answers = [{"llm": {"is_correct": right}, "confidence": {"is_correct": not right}} for right in (True, True, False)]
    one = NearestNeighbours(EvalConfig(threshold=0.0), {}, Known(["two apples", "two pears", "rain today"], answers))
    one.num_neighbours = 3
    assert [one.gain(q) for q in ("two apples", "rain today", "nothing alike")] == pytest.approx([1 / 3] * 3)
    one.num_neighbours = 1
    assert (one.gain("two pears now"), one.gain("no rain")) == (1.0, -1.0)


@pytest.mark.parametrize("right", [True, False])
def test_a_score_learned_where_all_are_alike_is_their_share(right):
    answer = {"value": -0.1, "cost": {"generated": 9}, "extracted": "4", "is_correct": right}
    chooser = FrugalGPT(EvalConfig(), {}, Known(["one"], [{"confidence": answer}]))
    assert chooser.score(answer) == float(right)


def test_what_learns_needs_a_run_to_learn_from(tmp_path):
    with pytest.raises(ConfigError, match="pass --known"):
        evaluate(EvalConfig(strategies="frugalgpt", out=str(tmp_path), llm="tiny:llm", limit=2, max_new_tokens=4))


def test_what_chooses_among_answers_writes_none_itself():
    import s2t

    with pytest.raises(ConfigError, match="works on finished runs"):
        s2t.load("tiny:slm").generate("1 + 1 =", "cascade")
