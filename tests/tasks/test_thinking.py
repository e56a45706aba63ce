"""Thinking is no answer, whatever the marks a model puts around it; neither is a thought that never ended."""

from __future__ import annotations

import time

import pytest

from s2t.records import Grade
from s2t.tasks.choices import grade_choice
from s2t.tasks.graders import extract_answer, grade_math
from s2t.tasks.programs import extract_code
from s2t.tasks.thinking import without_thinking

MARKS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<THINK>", "</THINK>"),
    ("< think >", "< /think >"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reflection>", "</reflection>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<analysis>", "</analysis>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|think|>", "<|/think|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("&lt;think&gt;", "&lt;/think&gt;"),
    ("<think>", "</thinking>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("Here is my thought process:\n", "\nHere is my response:\n"),
    ("<unused94>thought\n", "<unused95>"),
    ("", "</think>"),  # the prompt began it
]


@pytest.mark.parametrize(("begin", "end"), MARKS)
def test_what_stands_in_thoughts_is_not_graded(begin: str, end: str):
    for inside in ("so \\boxed{8}.", "#### 8", "The answer is 8.", "<answer>8</answer>", "8"):
        thought = f"{begin}{inside}{end}"
        assert grade_math("8", thought) == Grade(False, None)
        assert not grade_math("8", f"{thought}\nThe answer is \\boxed{{7}}.").is_correct
        assert grade_math("7", f"{thought}\nThe answer is 7.").is_correct
        assert extract_answer(f"{thought}\nI do not know", gold_is_number=True) is None
    choices = ["one", "two", "three"]
    assert grade_choice("B", f"{begin}\\boxed{{B}}{end}", choices) == Grade(False, None)
    assert grade_choice("C", f"{begin}The answer is B.{end}\nThe answer is C.", choices).is_correct
    code = "```python\ndef f():\n    return 1\n```"
    assert extract_code(f"{begin}\n{code}\n{end}", "f") is None


@pytest.mark.parametrize("begin", [begin for begin, _ in MARKS if begin])
def test_a_thought_that_never_ended_is_not_graded(begin: str):
    assert grade_math("8", f"{begin}so it is \\boxed{{8}}") == Grade(False, None)
    assert grade_choice("B", f"{begin}The answer is B.", ["one", "two"]) == Grade(False, None)
    assert grade_math("8", f"It is \\boxed{{8}}.\n{begin}Or is it \\boxed{{9}}?").is_correct


@pytest.mark.parametrize(
    "text", ["I think it is 8.", "a < b, think [of it]", "[reason] 8", "\\cot x", "<b>8</b>", "the draft <8>"]
)
def test_other_words_are_no_marks(text: str):
    assert without_thinking(text) == text


def test_thoughts_within_thoughts_and_several_of_them():
    assert without_thinking("<think>a<think>b</think>c</think>d") == "d"
    assert without_thinking("<think>a<reflection>b</reflection>c") == ""
    assert without_thinking("<think>a</think>b<think>c</think>d").split() == ["b", "d"]


@pytest.mark.parametrize(
    "part", ["<think>", "</think>", "<", "[THINK", "<think ", "Here is my ", "<|channel|>analysis", "end_of_"]
)
def test_many_marks_take_no_longer_than_their_length(part: str):
    start = time.process_time()
    without_thinking(part * (400_000 // len(part)))
    assert time.process_time() - start < 5
