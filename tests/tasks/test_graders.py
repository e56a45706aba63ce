"""Reading and comparing answers: every gold equals itself, and what merely looks alike does not."""

from __future__ import annotations

import json
import os
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from s2t.tasks import load_task
from s2t.tasks.graders import canonical_answer, extract_answer, grade_math, is_same_answer, parse_number
from s2t.tasks.problems import SPLITS

needs_data = pytest.mark.skipif(
    not os.environ.get("S2T_DATA_DIR"), reason="S2T_DATA_DIR is not set: no benchmark files to read"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 1\nWait.\n#### 1,200.", "1200"),
        ("#### $18 per day\n\nQuestion: what of 5?", "18"),
        ("first \\boxed{3}, then \\boxed{18}", "18"),
        ("\\boxed{18\\text{ dollars}} for 2 days", "18"),
        ("\\boxed{\\$1{,}200}", "1200"),
        ("#### Step 2\n2 + 2, so \\boxed{4}", "4"),
        ("#### 2. Add them up\nThe answer is 9.", "9"),
        ("#### Final Answer\n7", "7"),
        ("#### Final Answer\nThe total is 7 apples.", "7"),
        ("#### Step 2\nSo 3+4=7.\n\nThe answer is 7.", "7"),
        ("#### Day 7\nHe eats 9.\nThe answer is 9.", "9"),
        ("#### 18 dollars\nI hope that helps 2 of you", "18"),
        ("So the total is 2+1=<<2+1=3>>3 bolts.", "3"),
        ("Since tan x < cot x here and 2 > 1, the answer is 7.", "7"),
        ("<answer>3</answer> no, <answer> 12 </answer> of 99", "12"),
        ("The answer is $5. There were 9 of them.", "5"),
        ("The answer is 3 * 4 = 12 apples", "12"),
        ("**Answer:** 12", "12"),
        ("She has 3, then 4.50.", "4.50"),
        ("from 10-4 we get", "4"),
        ("it is −5", "-5"),
        ("\\boxed{\\sqrt{4}}", "\\sqrt{4}"),
        ("no number at all", None),
        ("", None),
    ],
)
def test_a_number_is_read_where_the_text_states_it(text: str, expected: str | None):
    assert extract_answer(text, gold_is_number=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so \\boxed{\\frac{1}{x^{2}}} it is", "\\frac{1}{x^{2}}"),
        ("We see.\nThe answer is (B).", "(B)"),
        ("#### Final Answer\nThe answer is $\\sqrt{2}$.", "$\\sqrt{2}$"),
        ("thinking\n#### 1 2\n3 4", "1 2\n3 4"),
        ("line one\n  yes \n\n", "yes"),
        ("\\boxed{unclosed", "\\boxed{unclosed"),
        ("  \n", None),
    ],
)
def test_another_answer_is_read_whole(text: str, expected: str | None):
    assert extract_answer(text, gold_is_number=False) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("$1,200.50", Fraction(2401, 2)),
        ("-.5", Fraction(-1, 2)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("1/0", None),
        ("12,34", None),
        ("2n", None),
        ("9" * 5000, None),
    ],
)
def test_plain_numbers_are_exact_and_nothing_else_is_one(text: str, value: Fraction | None):
    assert parse_number(text) == value


def test_equal_answers_vote_together():
    assert {canonical_answer(text) for text in ("12", "12.0", "$12", " 12. ", "\\$12", "\\boxed{12}")} == {"12"}
    assert canonical_answer("0.5") == canonical_answer("1/2") == canonical_answer("\\frac{1}{2}")
    assert canonical_answer("2 n") == canonical_answer("$2n$") != canonical_answer("2")
    assert canonical_answer("Friday.") == canonical_answer("\\text{friday}")
    assert canonical_answer(None) is None
    assert canonical_answer(" ") is None


@pytest.mark.parametrize(
    "text", ["#### 5 is the number of apples that Janet has left, so 5", f"\\boxed{{5 {'ha' * 90}1}}"]
)
def test_words_behind_a_number_are_read_in_time_that_grows_with_them(text: str):
    start = time.process_time()
    grade_math("5", text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("18", "18.00", True),
        ("18", "18.001", False),
        ("5", "-5", False),
        ("1/3", "0.333333333", True),
        ("0.5", "50\\%", True),
        ("50", "50%", True),
        ("20%", "0.2%", False),
        ("\\frac{1}{3}\\%", "0.333333", True),
        ("1/3000000", "3.33333e-7", True),
        ("1/3000000", "3e-7", False),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("\\sqrt{xy}", "\\sqrt{x}\\sqrt{y}", True),
        ("\\sqrt{x^2}", "x", False),
        ("$69$,$84$", "84, 69", True),
        ("(1,2)", "(2,1)", False),
        ("$k=1$", "1", True),
        ("Friday", "friday.", True),
        ("east", "seat", False),
        ("2^{1009}", "2^{1008} \\cdot 2", True),
        ("4", "10^{10^{10^{10}}}", False),
        ("4", "x^{9999999999}", False),
        ("4", "\\frac{", False),
    ],
)
def test_answers_are_the_same_when_their_values_are(gold: str, answer: str, same: bool):
    assert is_same_answer(gold, answer) is same


def test_a_stated_tolerance_is_allowed_and_no_more():
    assert grade_math("4.2", "\\boxed{4.3}", tolerance=0.1).is_correct
    assert not grade_math("4.2", "\\boxed{4.31}", tolerance=0.1).is_correct


def test_a_text_without_an_answer_is_not_correct():
    grade = grade_math("4", "I do not know")
    assert (grade.is_correct, grade.extracted) == (False, None)


def test_a_thread_grades_as_the_main_thread_does():
    grades: list[bool] = []
    thread = threading.Thread(target=lambda: grades.append(is_same_answer("2\\sqrt{2}", "\\sqrt{8}")))
    thread.start()
    thread.join()
    assert grades == [True]


ROWS = {"gsm8k": 1319 + 7473, "svamp": 1000, "amc23": 40, "aime24": 30, "olympiadbench": 675}


@needs_data
@pytest.mark.parametrize("name", list(ROWS))
def test_every_gold_is_correct_against_itself_and_boxed(name: str):
    task = load_task(name, "cot")
    rows = [problem for split in SPLITS for problem in task.stream(split, 0)]
    assert len(rows) == ROWS[name]
    for problem in rows:
        for text in (f"#### {problem.answer}", f"so we have \\boxed{{{problem.answer}}}."):
            grade = task.grade(problem, text)
            assert grade.is_correct, (problem.problem_id, problem.answer, grade)


@needs_data
def test_every_gsm8k_solution_is_correct_and_its_neighbour_is_not():
    task = load_task("gsm8k")
    path = Path(os.environ["S2T_DATA_DIR"]) / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    solutions = {" ".join(row["question"].split()): row["answer"] for row in rows}
    for problem in task.problems("test", limit=10_000):
        solution = solutions[" ".join(problem.question.split())]
        assert task.grade(problem, solution).is_correct
        wrong = str(int(problem.answer.replace(",", "")) + 1)
        assert not task.grade(problem, solution.rpartition("####")[0] + f"#### {wrong}").is_correct
