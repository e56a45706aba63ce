"""Any JSON value in any field of a JSONL row makes a row or one line that says what is wrong, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2t.errors import DataError
from s2t.tasks import load_task

ROWS: dict[str, dict[str, Any]] = {
    "tolerance=error,template=kind": {"question": "1 + 1?", "answer": "2", "error": 0.1, "kind": "sum"},
    "choices=options": {"question": "Which?", "answer": "B", "options": ["one", "two"]},
    "choices=options,answer=gold": {
        "question": "Which?",
        "gold": "b",
        "options": {"text": ["1", "2"], "label": ["a", "b"]},
    },
    "test=tests,entry_point=name": {
        "question": "def f():\n",
        "answer": "    pass",
        "tests": "def check(f): f()",
        "name": "f",
    },
}
CASES = [(spec, name) for spec, row in ROWS.items() for name in row]
TEXTS = st.text(st.characters(exclude_categories=()), max_size=12)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.sampled_from([10**4000, 1e308, -0.0, "B"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


def problems(path: Path, spec: str) -> list[Any]:
    task = load_task(f"{path},{spec},split=test")
    found = list(task.stream("test", 0))
    for problem in found:
        json.dumps([problem.answer, problem.extra]).encode()
        problem.question.encode()
        if task.kind != "code":
            task.grade(problem, "\\boxed{2}")
    return found


@pytest.mark.parametrize(("spec", "name"), CASES)
@given(value=VALUES)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_is_a_row_or_one_line(spec: str, name: str, value: Any, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[spec] | {name: value}) + "\n")
    try:
        assert len(problems(path, spec)) == 1
    except DataError as error:
        assert "\n" not in str(error)
        assert "rows.jsonl:1" in str(error)
        assert len(str(error)) < 600
        str(error).encode(errors="strict")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "\\ud800", "answer": "1"}', "half of a surrogate pair"),
        ('{"question": "a", "answer": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"question": "a", "answer": ' + "7" * 5000 + "}", "digit"),
        ('{"question": {"a": 1}, "answer": "1"}', "must be a text, a number or a list of them; got dict"),
        ('{"question": "a", "answer": NaN}', "must be a text, a number or a list of them; got nan"),
        ('{"question": "a", "answer": "1", "error": "much"}', "'error' must be a number from 0 on; got 'much'"),
        ('{"question": "a", "answer": "1", "error": -1}', "must be a number from 0 on; got -1"),
        ('{"question": "a", "answer": "1", "error": Infinity}', "must be a number from 0 on; got inf"),
        ('{"question": "a", "answer": "1", "error": [1]}', "must be a number from 0 on; got list"),
        ('{"question": "a", "answer": "1", "error": true}', "must be a number from 0 on; got True"),
    ],
)
def test_a_line_that_is_no_row_says_where_and_why(line: str, reason: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "1 + 1?", "answer": "2"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        problems(path, "tolerance=error")
    assert reason in str(caught.value)
    assert "rows.jsonl:3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "change", "reason"),
    [
        ("test=tests,entry_point=name", {"tests": [1, None]}, "'tests' must be a text or a list of texts; got 1"),
        ("test=tests,entry_point=name", {"name": ["f"]}, "'name' must be the name of a function; got list"),
        ("test=tests,entry_point=name", {"name": "f()"}, "'name' must be the name of a function; got 'f()'"),
        ("test=tests,entry_point=name", {"name": "def"}, "'name' must be the name of a function; got 'def'"),
        ("choices=options", {"options": "one, two"}, "must be a list of texts"),
        ("choices=options", {"options": [{"a": 1}, "two"]}, "must be a text, a number or a list of them; got dict"),
        (
            "choices=options",
            {"options": {"text": ["1", "2"], "label": 3}},
            "a mapping with one label for each text; got 3",
        ),
        ("choices=options", {"answer": {"a": "\n"}}, "'dict' is none of the 2 choices"),
    ],
)
def test_a_field_of_a_wrong_kind_is_named(spec: str, change: dict[str, Any], reason: str, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[spec] | change) + "\n")
    with pytest.raises(DataError) as caught:
        problems(path, spec)
    assert reason in str(caught.value)


def test_a_tolerance_may_be_written_as_text_or_left_out(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"q{n}", "answer": "4.2", "error": value} for n, value in enumerate(["1e-1", None, "", 0])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = problems(path, "tolerance=error")
    assert sorted(problem.extra.get("tolerance", -1.0) for problem in found) == [-1.0, -1.0, 0.0, 0.1]
