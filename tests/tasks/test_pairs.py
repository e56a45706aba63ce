"""The graders on labelled pairs of gold answer and text, on texts that mean nothing, and under threads and forks."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from s2t.errors import MissingExtraError
from s2t.records import Grade
from s2t.tasks import judge
from s2t.tasks.choices import grade_choice
from s2t.tasks.graders import grade_math, is_same_answer
from s2t.tasks.programs import complete, extract_code

PAIRS = [json.loads(line) for line in Path(__file__).with_name("pairs.jsonl").read_text("utf-8").splitlines()]
MARKS = r"""
\frac{ } { \boxed{ $ ^ _ \sqrt{ \left( \right) ( ) [ ] 1 2 9 0 . , x n + - * / = < > \le ! % \% | \infty \pi \text{
and \cup \{ \} A (C) B. & \\ ** <answer> </answer> \pm \cdot \times ° ² ½ é 𝟗 \begin{pmatrix} \end{pmatrix} \int
\sum_{k=1}^ \binom{ \log \sin \overline{ e i 100 99999999 1e9 ' " #### ``` """
BLANKS = ["\u200b", "\x00", "\ud800", " ", "\t", "\n", "The answer is ", "answer: ", "def f(x):\n", "    return x\n"]
FRAGMENTS = [*MARKS.split(), *BLANKS]
GOLDS = ["18", "\\frac{3}{4}", "[2,5)", "(1,2)", "x^2+1", "1,2,3", "\\text{Evelyn}", "2\\sqrt{2}"]
BLOW_UPS = [
    "9^{9^{9^{9}}}",
    "9**9**9**9",
    "((((9^9)^9)^9)^9)^9",
    "(((((x^2+1)^{99}+1)^{99}+1)^{99}+1)^{99})",
    "99999!!!",
    "\\int_0^1 e^{x^{x^x}} dx",
    "\\sum_{k=1}^{10^9} k^k",
    "1e999999999",
    "\\binom{10^9}{10^6}",
]


def grade(pair: dict[str, Any]) -> Grade:
    if pair["kind"] == "choice":
        return grade_choice(pair["gold"], pair["text"], pair["choices"])
    return grade_math(pair["gold"], pair["text"], pair.get("tolerance"))


def test_the_graders_agree_with_the_labels_and_their_misses_are_the_known_ones():
    misses = [pair for pair in PAIRS if grade(pair).is_correct != pair["right"]]
    assert misses == [pair for pair in PAIRS if pair.get("known_miss")]
    for kind in ("math", "choice"):
        of_kind = [pair for pair in PAIRS if pair["kind"] == kind]
        wrong = [pair for pair in misses if pair["kind"] == kind]
        agreement = 1 - len(wrong) / len(of_kind)
        print(f"{kind}: {agreement:.2%} of {len(of_kind)} labelled pairs")
        assert agreement >= 0.99


def test_labelled_pairs_are_many_distinct_and_of_both_labels():
    assert len({json.dumps(pair, sort_keys=True) for pair in PAIRS}) == len(PAIRS) >= 850
    assert 0.25 < sum(pair["right"] for pair in PAIRS) / len(PAIRS) < 0.75


def fuzzed(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    texts = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 40))) for _ in range(count)]
    return [f"\\boxed{{{text}}}" if rng.random() < 0.5 else text for text in texts]


def grade_everywhere(texts: list[str]) -> float:
    """Grade each text with every grader; the longest seconds that one took."""
    rng, longest = random.Random(1), 0.0
    for text in texts:
        start = time.perf_counter()
        grades = [grade_math(rng.choice(GOLDS), text), grade_choice("C", text, ["a", "b", "c", "d"])]
        code = extract_code(text, "f")
        assert code is None or isinstance(complete("def f(x):\n", code, "f"), str)
        assert all(isinstance(item.is_correct, bool) for item in grades)
        assert all(item.extracted is not None or not item.is_correct for item in grades)
        longest = max(longest, time.perf_counter() - start)
    return longest


def test_meaningless_texts_neither_crash_nor_hang():
    assert grade_everywhere(fuzzed(400, seed=0)) < 60
    assert is_same_answer("2\\sqrt{2}", "\\sqrt{8}")


@pytest.mark.parametrize(
    "part", [*FRAGMENTS, "1,234", "<answer>", "\\boxed{1} ", "answer is ", "(A) ", "\\text{", "```\n", "x\n"]
)
def test_a_long_text_of_one_thing_takes_no_longer_than_its_length(part: str):
    start = time.process_time()
    grade_everywhere([part * (40_000 // len(part)), "\\boxed{" + part * 5_000])
    assert time.process_time() - start < 10


@pytest.mark.slow
def test_ten_thousand_meaningless_texts_neither_crash_nor_hang():
    start = time.perf_counter()
    longest = grade_everywhere(fuzzed(10_000, seed=1))
    print(f"10,000 texts in {time.perf_counter() - start:.0f} s, the longest {longest:.1f} s")
    assert longest < 60


def test_an_answer_that_computes_for_ever_is_given_up(caplog: pytest.LogCaptureFixture):
    start = time.perf_counter()
    assert judge.ask("math_verify", kind="equal", gold="4", answer=BLOW_UPS[0]) is None
    assert time.perf_counter() - start < 60
    assert "gave up" in caplog.text
    assert is_same_answer("3\\sqrt{2}", "\\sqrt{18}")


@pytest.mark.slow
@pytest.mark.parametrize("answer", BLOW_UPS)
def test_numbers_too_large_to_compute_are_wrong_in_bounded_time(answer: str):
    start = time.perf_counter()
    assert not grade_math("4", f"\\boxed{{{answer}}}").is_correct
    assert not judge.ask("math_verify", kind="equal", gold="4", answer=answer)
    assert time.perf_counter() - start < 60


def test_a_generators_scorer_is_bounded_too():
    pytest.importorskip("reasoning_gym")
    from s2t.tasks import load_task

    task = load_task("rg:countdown")
    problem = task.problems("test", 1)[0]
    start = time.perf_counter()
    assert not task.grade(problem, "\\boxed{9**9**9**9**9}").is_correct
    assert time.perf_counter() - start < 60
    assert task.grade(problem, f"\\boxed{{({problem.answer})}}").is_correct


def test_the_judge_cannot_be_made_to_write_files(tmp_path: Path):
    pytest.importorskip("reasoning_gym")
    if sys.platform != "linux":
        pytest.skip("the judge is confined on Linux only")
    from s2t.tasks import load_task

    task = load_task("rg:countdown")
    problem, path = task.problems("test", 1)[0], tmp_path / "written"
    task.grade(problem, f"\\boxed{{__import__('pathlib').Path('{path}').write_text('x')}}")
    assert not path.exists()


def test_many_threads_grade_as_one_does():
    pairs = [pair for pair in PAIRS if pair["about"] == "expression"]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(grade, pairs)) == [grade(pair) for pair in pairs]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_has_a_judge_of_its_own():
    script = (
        "import os\nfrom s2t.tasks.graders import is_same_answer as same\n"
        "assert same('2\\\\sqrt{2}', '\\\\sqrt{8}')\npid = os.fork()\n"
        "assert same('3\\\\sqrt{2}', '\\\\sqrt{18}') and not same('3\\\\sqrt{2}', '\\\\sqrt{17}')\n"
        "if pid:\n    assert os.waitpid(pid, 0)[1] == 0\n"
    )
    source = str(Path(judge.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_judge_killed_between_two_questions_is_started_again():
    assert is_same_answer("5\\sqrt{2}", "\\sqrt{50}")
    process = judge._judges["math_verify"]._process
    assert process is not None
    process.kill()
    process.wait()
    assert is_same_answer("6\\sqrt{2}", "\\sqrt{72}")


def test_without_math_verify_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"pip install 's2t\[eval\]'"):
        is_same_answer("7\\sqrt{2}", "\\sqrt{98}")
