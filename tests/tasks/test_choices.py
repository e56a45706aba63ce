"""Multiple choice: gold answers in every published shape become letters, and the question shows them."""

from __future__ import annotations

import pytest

from s2t.errors import DataError
from s2t.tasks.choices import extract_choice, gold_letter, letters, with_choices

GASES = ["Oxygen", "Nitrogen", "Helium"]


def test_choices_are_lettered_under_the_question():
    assert with_choices("Which gas?", GASES) == "Which gas?\n(A) Oxygen\n(B) Nitrogen\n(C) Helium"
    assert letters(10) == "ABCDEFGHIJ"
    for count in (0, 1, 27):
        with pytest.raises(DataError, match=f"2 to 26 choices; got {count}"):
            letters(count)


@pytest.mark.parametrize(
    ("gold", "labels"),
    [(1, None), ("B", None), ("B", ["A", "B", "C"]), ("2", ["1", "2", "3"]), ("Nitrogen", None), (" B ", None)],
)
def test_a_gold_answer_is_an_index_a_label_a_letter_or_the_choice(gold: object, labels: list[str] | None):
    assert gold_letter(gold, GASES, labels) == "B"


@pytest.mark.parametrize("gold", [3, -1, True, None, "D", "2", "nitrogen gas"])
def test_a_gold_answer_that_is_no_choice_is_an_error(gold: object):
    with pytest.raises(DataError, match="is none of the 3 choices"):
        gold_letter(gold, GASES)


@pytest.mark.parametrize("letter", "ABCDEFGHIJ")
def test_every_letter_is_read_from_every_common_wording(letter: str):
    choices = [f"choice number {n}" for n in range(10)]
    text = choices["ABCDEFGHIJ".index(letter)]
    for wording in (
        "\\boxed{%s}",
        "\\boxed{\\text{(%s)}}",
        "The answer is (%s).",
        "The answer is %s.",
        "Answer: %s",
        "**%s**",
        "%s",
        "#### %s",
        "The correct option is (%s) because it is.",
        "I considered (B) and (C).\n\nFinal answer: %s",
    ):
        assert extract_choice(wording % letter, choices) == letter, wording
    assert extract_choice(f"\\boxed{{{text}}}", choices) == letter
    assert extract_choice(f"{letter}. {text}", choices) == letter


def test_the_same_words_under_two_letters_name_none():
    assert extract_choice("\\boxed{yes}", ["yes", "yes", "no"]) is None
    assert extract_choice("\\boxed{no}", ["yes", "yes", "no"]) == "C"


@pytest.mark.parametrize(
    "text", ["Ｂ", "𝐁", "\\boxed{Ｂ}", "<think>C</think> The answer is B.<|im_end|>", "\\boxed{A}. No: \\boxed{B}"]
)
def test_a_letter_of_another_width_or_behind_thinking_is_read(text: str):
    assert extract_choice(text, GASES) == "B"


@pytest.mark.parametrize("text", ["\\boxed{A} or \\boxed{B}", "\\boxed{B} and \\boxed{C}", "<think>The answer is B"])
def test_two_boxes_joined_and_unended_thoughts_name_no_letter(text: str):
    assert extract_choice(text, GASES) is None


@pytest.mark.parametrize(
    "text",
    [
        "The answer is D. So B is incorrect.",
        "The answer is (D). Thus C cannot be right.",
        "I choose D. So A, B and C are out.",
        "The answer is D. Only B comes close.",
        "Therefore D is correct.",
        "So D, because it is larger.",
        "#### Final Answer\nD",
        "#### Answer: D",
        "#### Step 2: eliminate A\nThe answer is (D).",
    ],
)
def test_what_is_said_of_other_letters_states_no_answer(text: str):
    assert extract_choice(text, ["one", "two", "three", "four"]) == "D"
