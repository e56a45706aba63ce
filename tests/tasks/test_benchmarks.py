"""Named benchmarks as the hub has them, read by the real `datasets` from local folders of the same shape."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from s2t.errors import ConfigError, DataError
from s2t.tasks import SPLITS, check_disjoint, load_task, split_digest
from s2t.tasks.datasets import NAMED
from s2t.tasks.graders import is_readable

ROW: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "What is {n} + 1?", "answer": "It is <<{n}+1={m}>>{m}.\n#### {m}"},
    "math500": {"problem": "Find ${n} + 1$.", "solution": "So $\\boxed{{m}}$.", "answer": "{m}", "level": 1},
    "svamp": {"Body": "There are {n} cows.", "Question": "One more makes?", "Answer": "{m}.0"},
    "amc23": {"question": "What is {n} + 1?", "answer": 1.0},
    "aime24": {"problem": "What is {n} + 1?", "answer": "0{m}", "year": "2024"},
    "aime25": {"problem": "What is {n} + 1?", "answer": "{m}", "id": "1"},
    "olympiadbench": {"question": "What is {n} + 1?", "final_answer": ["${m}$"], "error": None, "unit": None},
    "mmlu_pro": {
        "question": "What is {n} + 1?",
        "options": ["{n}", "{m}", "-1"],
        "answer": "B",
        "answer_index": 1,
        "category": "math",
    },
    "arc_challenge": {
        "id": "{n}",
        "question": "What is {n} + 1?",
        "choices": {"text": ["{n}", "{m}", "-1", "-2"], "label": ["1", "2", "3", "4"]},
        "answerKey": "2",
    },
    "humaneval": {
        "task_id": "HumanEval/{n}",
        "prompt": "def next_{n}(x):\n",
        "entry_point": "next_{n}",
        "canonical_solution": "    return x + 1\n",
        "test": "def check(candidate):\n    assert candidate({n}) == {m}\n",
    },
}
HUB_SPLITS = {
    "gsm8k": {"train": 60, "test": 20},
    "svamp": {"train": 60, "test": 20},
    "aime24": {"train": 20},
    "olympiadbench": {"train": 20},
    "mmlu_pro": {"validation": 7, "test": 20},
    "arc_challenge": {"train": 30, "validation": 9, "test": 20},
}
DIGESTS = {
    "gsm8k": {
        "training": (6774, "3d8c704bbd48c82b"),
        "calibration": (699, "76dbd0d2a402affd"),
        "test": (1319, "d3a2f79670299474"),
    },
    "svamp": {"test": (1000, "8b23faa9a7808f2e")},
    "amc23": {"test": (40, "77fd5e0f27f9c13d")},
    "aime24": {"test": (30, "40143798e04d3795")},
    "olympiadbench": {"test": (675, "c3bb7ee929c344e7")},
    "humaneval": {"test": (164, "fbc64c11ebd566f9")},
}
needs_data = pytest.mark.skipif(
    not os.environ.get("S2T_DATA_DIR"), reason="S2T_DATA_DIR is not set: no benchmark files to read"
)


def filled(value: Any, n: int) -> Any:
    if isinstance(value, dict):
        return {key: filled(item, n) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, n) for item in value]
    return value.replace("{n}", str(n)).replace("{m}", str(n + 1)) if isinstance(value, str) else value


def rows_of(name: str, splits: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Rows whose questions differ everywhere."""
    rows, start = {}, 10
    for split, count in splits.items():
        rows[split] = [filled(ROW[name], n) for n in range(start, start + count)]
        start += count
    return rows


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a dataset where `datasets` looks before it asks the hub: a folder of its id in the current one."""
    datasets = pytest.importorskip("datasets")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.delenv("S2T_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    monkeypatch.chdir(tmp_path)

    def write(hub_id: str, config: str | None, rows: dict[str, list[dict[str, Any]]], kind: str = "parquet") -> None:
        folder = tmp_path / hub_id / (config or "data")
        folder.mkdir(parents=True)
        files = []
        for split, found in rows.items():
            path = folder / f"{split}-00000-of-00001.{kind}"
            if kind == "parquet":
                pq.write_table(pa.Table.from_pylist(found), path)
            else:
                path.write_text("".join(json.dumps(row) + "\n" for row in found))
            files.append(f"  - split: {split}\n    path: {path.relative_to(tmp_path / hub_id)}\n")
        card = f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n{''.join(files)}---\n"
        (tmp_path / hub_id / "README.md").write_text(card)

    return write


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("name", list(NAMED))
def test_a_benchmark_in_the_hubs_shape_is_read_and_split(hub: Any, name: str, kind: str):
    source, splits = NAMED[name], HUB_SPLITS.get(name, {"test": 20})
    hub(source.hub_id, source.config, rows_of(name, splits), kind)
    task = load_task(name, "cot")
    found = {split: list(task.stream(split, 0)) for split in SPLITS}
    assert len(found["test"]) == 20
    assert sum(len(problems) for problems in found.values()) == sum(splits.values())
    if "validation" in splits:
        assert len(found["calibration"]) == splits["validation"]
    elif len(splits) == 2:
        assert found["training"] and found["calibration"]
    check_disjoint(found["training"] + found["calibration"], found["test"], name)
    if task.kind != "code":
        for problem in found["test"]:
            assert task.grade(problem, f"so \\boxed{{{problem.answer}}}").is_correct
            wrong = "A" if task.kind == "choice" else f"{problem.answer}9"
            assert not task.grade(problem, f"so \\boxed{{{wrong}}}").is_correct


@pytest.mark.parametrize(
    ("kind", "name", "ending"),
    [
        ("math", "math500", "\nPlease reason step by step, and put your final answer within \\boxed{}."),
        (
            "choice",
            "mmlu_pro",
            "\n(C) -1\nPlease reason step by step, and put the letter of your choice within \\boxed{}.",
        ),
        ("code", "humaneval", "in one ```python block."),
    ],
)
def test_each_kind_asks_for_its_own_kind_of_answer(hub: Any, kind: str, name: str, ending: str):
    hub(NAMED[name].hub_id, NAMED[name].config, rows_of(name, HUB_SPLITS.get(name, {"test": 3})))
    task, plain = load_task(name, "cot"), load_task(name)
    problem = task.problems("test", 1)[0]
    assert task.kind == kind
    assert task.prompt(problem).endswith(ending)
    assert task.prompt(problem).startswith(plain.prompt(problem)) and plain.prompt(problem) == problem.question


def test_any_hub_dataset_of_choices_is_named_by_its_fields(hub: Any):
    rows = [{"q": f"What is {n}?", "c": [str(n), "none"], "a": 0, "d": f"domain{n % 2}"} for n in range(40)]
    hub("someone/quiz", None, {"test": rows})
    task = load_task("hub:someone/quiz,question=q,choices=c,answer=a,template=d")
    problem = task.problems("test", 1)[0]
    assert (task.kind, problem.answer, task.templates()) == ("choice", "A", ("domain0", "domain1"))
    assert task.grade(problem, "The answer is (A).").is_correct
    with pytest.raises(ConfigError, match="kind must be one of math, choice, code; got 'essay'"):
        load_task("hub:someone/quiz,kind=essay")


def test_a_jsonl_of_choices_says_which_row_is_wrong(tmp_path: Path):
    path = tmp_path / "quiz.jsonl"
    good = {"question": "Which?", "choices": ["a b", "c d"], "answer": "c d"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({**good, "answer": "e"}) + "\n")
    with pytest.raises(DataError, match=r"quiz\.jsonl:2: the gold answer 'e' is none of the 2 choices"):
        load_task(f"{path},kind=choice").problems("test", 1)
    path.write_text(json.dumps({**good, "choices": "a, b"}) + "\n")
    with pytest.raises(DataError, match=r"quiz\.jsonl:1: the choices in 'choices' must be a list"):
        load_task(f"{path},kind=choice").problems("test", 1)


def test_local_files_may_be_parquet_and_have_a_calibration_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = rows_of("arc_challenge", {"train": 30, "calibration": 9, "test": 20})
    (tmp_path / "arc_challenge").mkdir()
    for role, found in rows.items():
        pq.write_table(pa.Table.from_pylist(found), tmp_path / "arc_challenge" / f"{role}.parquet")
    monkeypatch.setenv("S2T_DATA_DIR", str(tmp_path))
    task = load_task("arc_challenge")
    assert [len(task.problems(split, 100)) for split in SPLITS] == [30, 9, 20]
    assert all(problem.answer == "B" for problem in task.problems("test", 100))


def test_a_split_digest_is_of_the_questions_alone(hub: Any):
    hub(NAMED["amc23"].hub_id, None, rows_of("amc23", {"test": 20}))
    problems = load_task("amc23").problems("test", 20, seed=0)
    assert split_digest(problems) == split_digest(load_task("amc23", "cot").problems("test", 20, seed=5))
    assert split_digest(problems[1:]) != split_digest(problems)


@needs_data
@pytest.mark.parametrize("name", list(DIGESTS))
def test_splits_are_the_documented_ones(name: str):
    task = load_task(name)
    for split, stated in DIGESTS[name].items():
        problems = task.problems(split, 100_000)
        assert (len(problems), split_digest(problems)) == stated


@needs_data
@pytest.mark.parametrize(
    "name", ["gsm8k", "svamp", "amc23", "aime24", pytest.param("olympiadbench", marks=pytest.mark.slow)]
)
def test_every_published_answer_parses(name: str):
    task = load_task(name)
    rows = [problem for split in SPLITS for problem in task.stream(split, 0)]
    unread = [problem.answer for problem in rows if not is_readable(problem.answer)]
    print(f"{name}: {len(rows) - len(unread)} of {len(rows)} published answers parse")
    assert unread == []
