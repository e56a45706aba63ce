"""Strategies by name: votes, triggers that fit, thresholds that are there."""

from __future__ import annotations

import re

import pytest
import torch

from s2t.cli.options import field_docs
from s2t.config import NEEDS_LLM, OVER_ANSWERS, TRIGGERS, WRITERS, DecodeConfig, EvalConfig, GenerateConfig
from s2t.config.methods import TRIGGER_NEEDS
from s2t.errors import ConfigError
from s2t.methods.base import find
from s2t.methods.sample import vote
from s2t.methods.strategies import build_strategy


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["7"], "7"),
        (["3", "7", "7"], "7"),
        (["3", "7", "7", "3"], "3"),  # a tie goes to the earliest
        (["7", "3", "3", "7"], "7"),
        ([None, None, "5"], "5"),  # no answer never wins over an answer
        ([None, None, "5", "6", "6"], "6"),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_majority_wins_ties_go_to_the_earliest_and_none_never_wins(answers, winner):
    assert vote(answers) == winner


def test_a_vote_counts_answers_not_correct_ones():
    """Seven wrong votes beat one right answer; the released code's self-consistency would have taken it."""
    assert vote(["right", *["wrong"] * 7]) == "wrong"


@pytest.mark.parametrize(
    ("name", "trigger"),
    [
        ("s2t-local", "divergence"),  # needs the LLM
        ("s2t-local", "step-score"),
    ],
)
def test_a_trigger_that_does_not_fit_is_one_clear_line(name, trigger):
    with pytest.raises(ConfigError, match=f"strategy {name} takes trigger .*; got '{trigger}'"):
        build_strategy(name, DecodeConfig(trigger=trigger), {trigger: 1.0})


@pytest.mark.parametrize(
    ("name", "trigger"), [("s2t", "divergence"), ("s2t-local", "criticality"), ("takeover", "entropy")]
)
def test_a_trigger_without_a_threshold_names_the_next_step(name, trigger):
    with pytest.raises(ConfigError, match=f"trigger {trigger} has no threshold; pass --threshold"):
        build_strategy(name, DecodeConfig(trigger=trigger), {})


def test_a_given_threshold_beats_the_calibrated_one_of_its_own_trigger():
    thresholds = {"divergence": 1.5, "entropy": 2.5}
    assert build_strategy("s2t", DecodeConfig(), thresholds).threshold == 1.5
    assert build_strategy("s2t", DecodeConfig(trigger="entropy"), thresholds).threshold == 2.5
    assert build_strategy("s2t", DecodeConfig(threshold=0.25), thresholds).threshold == 0.25
    assert build_strategy("s2t", DecodeConfig(threshold=0.0), thresholds).threshold == 0.0


def test_k_is_the_given_one_else_the_adapters_else_8():
    assert build_strategy("greedy", DecodeConfig(), {}).num_candidates == 8
    assert build_strategy("greedy", DecodeConfig(), {}, 5).num_candidates == 5
    assert build_strategy("greedy", DecodeConfig(num_candidates=3), {}, 5).num_candidates == 3


def test_only_methods_that_say_so_read_the_llm_beside_the_slm():
    thresholds = dict.fromkeys(TRIGGERS, 0.5)
    names = [name for name in WRITERS if name not in ("r2r", "forecast")]  # which need a trained folder to be built
    needs = {name for name in names if "llm" in build_strategy(name, DecodeConfig(), thresholds).needs}
    ours, others = (
        {"s2t", "takeover"},
        {"speculative", "specreason", "smart", "glimprouter", "relay", "contrastive", "released"},
    )
    assert needs == ours | others
    assert needs == NEEDS_LLM - {"llm", "r2r"}


def test_what_a_trigger_needs_is_what_its_class_says():
    assert {name: find(where).needs for name, where in TRIGGERS.items() if find(where).needs} == TRIGGER_NEEDS


@pytest.mark.parametrize(
    ("names", "config", "field"),
    [
        (TRIGGERS, DecodeConfig, "trigger"),
        (WRITERS, GenerateConfig, "strategy"),
        (OVER_ANSWERS, EvalConfig, "strategies"),
    ],
    ids=["triggers", "strategies of generate", "strategies of eval alone"],
)
def test_the_help_names_them_all(names, config, field):
    assert set(names) <= set(re.split(r"[ ,:.]+", field_docs(config)[field]))


@pytest.mark.parametrize("where", TRIGGERS.values())
def test_a_trigger_fires_on_the_side_of_its_threshold_that_it_names(where):
    trigger = find(where)
    fires = trigger.fires(trigger.__new__(trigger), torch.tensor([0.1, 0.5, 0.9]), 0.5).tolist()
    assert fires == ([True, False, False] if trigger.fires_below else [False, False, True])
