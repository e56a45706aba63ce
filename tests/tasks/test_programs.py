"""Code tasks: the function is found in the text, completed from the prompt, and judged by its tests."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from s2t.errors import ConfigError
from s2t.tasks import load_task
from s2t.tasks.programs import complete, extract_code, grade_program
from s2t.tasks.sandbox import ALLOW

PROMPT = 'from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n    """Double each."""\n'
TESTS = "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n    assert candidate([]) == []\n"
WHOLE = "def double(xs: List[int]) -> List[int]:\n    return [2 * x for x in xs]\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="code is run on Linux only")
needs_data = pytest.mark.skipif(
    not os.environ.get("S2T_DATA_DIR"), reason="S2T_DATA_DIR is not set: no benchmark files to read"
)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(ALLOW, "1")


@linux
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    "text",
    [
        f"Here it is:\n```python\n{WHOLE}```\nIt doubles.",
        f"```python\n{WHOLE}```\nUse it so:\n```python\nprint(double([1]))\n```",
        f"```\n{PROMPT}    return [2 * x for x in xs]\n```",
        f"```python\nfrom typing import List\n{WHOLE}",
        f"  ```python\n  {WHOLE.replace(chr(10), chr(10) + '  ')}\n  ```",
        f"{PROMPT}    return [2 * x for x in xs]",
        f"Sure, here is the function.\n{WHOLE}\nThis function doubles each.",
        "    return [2 * x for x in xs]\n\n\ndef other():\n    pass\nprint(other(",
        "return [2 * x for x in xs]",
        "found = []\n    for x in xs:\n        found.append(2 * x)\n    return found",
        "found = []\nfor x in xs:\n    found.append(2 * x)\nreturn found",
        "```python\n    return [2 * x for x in xs]\n```",
        f"```bash\npip install numpy\n```\n```py\n{WHOLE}```",
        f"```python\n{WHOLE}\ndef helper():\n    pass\n```",
        f"```python\ndef twice(x):\n    return 2 * x\n\n{WHOLE.replace('2 * x', 'twice(x)')}```",
        "```python\nasync_ = 1\ndef double(xs):\n\treturn [x + x for x in xs]\n```",
    ],
)
def test_a_right_function_passes_however_it_is_written_down(text: str):
    assert grade_program(PROMPT, text, TESTS, "double").is_correct


@linux
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    "text",
    [
        WHOLE.replace("2 *", "3 *"),
        "```python\ndef double(xs):\n    return [2, 4]\n```",
        "```python\ndef twice(xs):\n    return [2 * x for x in xs]\n```",
        "```python\nimport os\nos._exit(0)\n```",
        "```python\nraise SystemExit(0)\n```",
        "I cannot write this.",
        "",
        "```python\n```",
        "    pass",
        "```python\ndef double(xs):\n    while True: pass\n```",
    ],
)
def test_a_wrong_function_fails(text: str):
    assert not grade_program(PROMPT, text, TESTS, "double", timeout_s=3).is_correct


def test_the_last_block_that_defines_the_function_is_taken():
    text = f"```python\n{WHOLE}```\nBetter:\n```python\n{WHOLE.replace('2 *', '4 *')}```\n```python\ndouble([1])\n```"
    assert extract_code(text, "double") == WHOLE.replace("2 *", "4 *").rstrip()
    assert extract_code("\n \n", "double") is None


def test_imports_and_helpers_of_the_prompt_stand_above_the_function():
    assert complete(PROMPT, WHOLE, "double").startswith("from typing import List\n")
    assert complete(PROMPT, "assert True", None) == "assert True"


@linux
@pytest.mark.usefixtures("allowed")
def test_a_jsonl_file_of_code_needs_no_code(tmp_path: Path):
    row = '{"question": "Write add.", "code": "def add(a, b):\\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}'
    path = tmp_path / "mbpp.jsonl"
    path.write_text(row)
    task = load_task(f"{path},answer=code,test=test_list", "cot")
    problem = next(found[0] for split in ("training", "calibration", "test") if (found := list(task.stream(split, 0))))
    assert task.kind == "code"
    assert "nothing but code" in task.prompt(problem)
    assert task.grade(problem, f"```python\n{problem.answer}\n```").is_correct
    assert not task.grade(problem, "```python\ndef add(a, b):\n    return a - b\n```").is_correct
    assert task.canonical("a  b") == "a  b"


def test_code_is_refused_before_anything_is_written(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ALLOW, raising=False)
    with pytest.raises(ConfigError, match=f"runs code that a model wrote.* set {ALLOW}=1"):
        load_task("humaneval").check_gradable()
    load_task("gsm8k").check_gradable()


@linux
@needs_data
@pytest.mark.usefixtures("allowed")
def test_every_canonical_solution_of_humaneval_passes():
    task = load_task("humaneval")
    problems = task.problems("test", 1000)
    assert len(problems) == 164
    with ThreadPoolExecutor(2) as pool:
        grades = list(pool.map(lambda problem: task.grade(problem, problem.answer), problems))
    assert [grade.is_correct for grade in grades] == [True] * 164


@linux
@needs_data
@pytest.mark.usefixtures("allowed")
def test_canonical_solutions_pass_as_whole_functions_and_an_empty_body_fails():
    task = load_task("humaneval")
    for problem in task.problems("test", 8):
        whole = f"```python\n{problem.question}{problem.answer}\n```"
        assert task.grade(problem, whole).is_correct
        assert not task.grade(problem, f"```python\n{problem.question}    pass\n```").is_correct


GUARDS = [
    'if __name__ == "__main__":\n    print(double([int(input())]))\n',
    'if __name__ == "__main__":\n    import unittest\n    unittest.main()\n',
    "if __name__ == '__main__':\n    import argparse\n    argparse.ArgumentParser().parse_args(['-x'])\n",
    "if '__main__' == __name__: raise SystemExit(0)\n",
    "match __name__:\n    case '__main__':\n        while True: pass\n",
]


@linux
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("guard", GUARDS)
def test_what_an_answer_does_as_a_script_is_not_done(guard: str):
    for text in (f"```python\n{WHOLE}\n{guard}```", f"{WHOLE}\n{guard}"):
        assert grade_program(PROMPT, text, TESTS, "double", timeout_s=3).is_correct
    wrong = WHOLE.replace("2 *", "3 *")
    assert not grade_program(PROMPT, f"```python\n{wrong}\n{guard}```", TESTS, "double", timeout_s=3).is_correct


@linux
@pytest.mark.usefixtures("allowed")
def test_tests_that_are_guarded_are_run():
    tests = (
        "import unittest\nclass Test(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)\n"
        "if __name__ == '__main__':\n    assert unittest.main(exit=False).result.wasSuccessful()\n"
    )
    for sign, right in (("+", True), ("-", False)):
        text = f"```python\ndef add(a, b): return a {sign} b\n\nif __name__ == '__main__':\n    input()\n```"
        assert grade_program("", text, tests, None).is_correct is right


BODY = "    return [2 * x for x in xs]\n"


@linux
@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    "text",
    [
        f"{BODY}```\nThis function doubles each number in the list.",
        f"{BODY}```\n\nUse it so:\n\n```python\nprint(double([1]))\n```",
        "return [2 * x for x in xs]\n```\nThis returns the list.",
        f"{WHOLE}```\nThis function doubles each number.",
        f"```python\n{WHOLE}```\nOr shorter:\n```python\ndef double(xs: List[int]) -> List[int]:\n    return [2 * x fo",
        f"```python\n{WHOLE}```\nOr:\n```python\ndef double(xs):\n    out = []\n",
        f"```python\nfrom __future__ import annotations\nimport dataclasses as d\n@d.dataclass\nclass A:\n    x: int\n{WHOLE}```",
        '```python\ndef double(xs):\n    """\n    ```\n    double([1])\n    ```\n    """\n    return [2 * x for x in xs]\n```',
        f"~~~python\n{WHOLE}~~~",
        f"```python\n{WHOLE.rstrip()}```",
        f"````python\n{WHOLE}````",
        f"<think>```python\ndef double(xs): return xs\n```</think>\n```python\n{WHOLE}```",
        "```python\ndouble = lambda xs: [2 * x for x in xs]\n```",
    ],
)
def test_the_code_is_found_among_fences_and_prose(text: str):
    assert grade_program(PROMPT, text, TESTS, "double").is_correct


@pytest.mark.parametrize(
    "text",
    [
        "```python\n" + "\n" * 16_000 + "\n```",
        "\n" * 200_000,
        "```\n" * 40_000,
        "    \n" * 40_000,
        "def double(xs):\n" * 8_000,
        "(" * 100_000,
        "x = 1\n" * 20_000 + "(",
        "def double" + " " * 100_000,
        '"""' * 50_000,
        "\\\n" * 50_000,
        "def double(xs):\n    return [\n" + "1,\n" * 50_000,
    ],
)
def test_code_is_found_in_time_that_grows_with_the_text(text: str):
    start = time.process_time()
    for entry_point in ("double", None):
        code = extract_code(text, entry_point)
        assert code is None or complete(PROMPT, code, entry_point)
    assert time.process_time() - start < 10
