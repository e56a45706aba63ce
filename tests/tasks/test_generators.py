"""Every generator of reasoning-gym is opened, asked for problems and graded."""

from __future__ import annotations

import pytest

from s2t.errors import ConfigError
from s2t.tasks import load_task

pytest.importorskip("reasoning_gym")

from reasoning_gym.factory import DATASETS

SETTINGS = {"composite": ",datasets=chain_sum+word_sorting"}


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_generator_gives_problems_and_grades_them(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("s2t.tasks.reasoning.CHUNK_SIZE", 16)
    task = load_task(f"rg:{name}{SETTINGS.get(name, '')}")
    for problem in task.problems("training", 2):
        assert not task.grade(problem, "<answer>nothing of the kind</answer>").is_correct
        assert not task.grade(problem, f"<think>\\boxed{{{problem.answer}}}").is_correct
        if problem.answer:  # some have many right answers and publish none
            assert task.grade(problem, f"<think>hm</think><answer>{problem.answer}</answer>").is_correct


def test_settings_that_a_generator_breaks_on_are_one_line():
    for spec in (
        "composite",
        "composite,datasets=nope",
        "tsumego,max_stones=1",
        "power_function,min_base=x",
        "chain_sum,min_terms={}",
    ):
        with pytest.raises(ConfigError, match="refuses its settings") as caught:
            load_task(f"rg:{spec}").problems("training", 1)
        assert "\n" not in str(caught.value)


def test_a_number_with_more_beside_it_is_no_answer_to_a_word_problem():
    task = load_task("rg:gsm_symbolic")
    problem = task.problems("training", 1)[0]
    assert not task.grade(problem, f"<answer>{problem.answer} 7</answer>").is_correct
