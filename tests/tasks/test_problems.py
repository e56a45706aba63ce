"""Tasks and splits: disjoint by wording, a function of the seed, and the same whatever the limit."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from s2t.errors import ConfigError, DataError, MissingExtraError, OverlapError
from s2t.records import Problem
from s2t.tasks import (
    SPLITS,
    check_disjoint,
    heldout_templates,
    load_task,
    question_hash,
    split_fraction,
    split_of,
)
from s2t.tasks.problems import Task

GSM = "rg:gsm_symbolic,max_number=100"
needs_data = pytest.mark.skipif(
    not os.environ.get("S2T_DATA_DIR"), reason="S2T_DATA_DIR is not set: no benchmark files to read"
)


@pytest.fixture(scope="module")
def gsm() -> Task:
    pytest.importorskip("reasoning_gym")
    return load_task(GSM)


@pytest.fixture
def no_local_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("S2T_DATA_DIR", raising=False)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def additions(count: int, word: str = "plus") -> list[dict]:
    return [{"question": f"What is {n} {word} 1?", "answer": str(n + 1), "kind": f"k{n % 3}"} for n in range(count)]


def test_the_split_of_a_question_is_the_documented_hash():
    digest = hashlib.blake2b(b"What is 2 plus 2?", digest_size=8).digest()
    assert split_fraction("What is 2 plus 2?") == int.from_bytes(digest, "big") / 2**64
    assert question_hash("What is 2 plus 2?") == digest.hex()


def test_white_space_never_moves_a_question_and_shares_are_as_stated():
    assert split_fraction(" a\n b\tc ") == split_fraction("a b c")
    splits = [split_of(f"question {index}") for index in range(5000)]
    shares = [splits.count(name) / 5000 for name in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_overlap_is_an_error_that_names_the_problems():
    problems = [Problem(f"t-{question_hash(q)}", "t", "test", q, "1") for q in "abcdef"]
    check_disjoint(problems[:3], problems[3:], "training and test")
    with pytest.raises(OverlapError, match=f"training and test .* 1 found in both: {problems[2].problem_id};"):
        check_disjoint(problems[:3], problems[2:], "training and test")
    with pytest.raises(OverlapError, match=r"4 found in both: .*, \.\.\.;"):
        check_disjoint([item.problem_id for item in problems], {question_hash(q) for q in "abcd"}, "sides")


def test_held_out_templates_depend_on_names_alone():
    names = [str(index) for index in range(40)]
    held = heldout_templates(names, 0.25)
    assert len(held) == 10
    assert held == heldout_templates(reversed(names), 0.25)
    assert held < heldout_templates(names, 0.5)
    assert heldout_templates(names, 0) == frozenset()
    assert len(heldout_templates(["a", "b"], 0.01)) == 1
    assert len(heldout_templates(["a", "b"], 0.9)) == 1
    assert heldout_templates(["a"], 0.5) == frozenset()


@pytest.mark.parametrize("split", SPLITS)
def test_a_smaller_limit_is_a_prefix_of_a_larger_one(gsm: Task, split: str):
    many = gsm.problems(split, limit=100, seed=3)
    assert many[:10] == gsm.problems(split, limit=10, seed=3)
    assert many == load_task(GSM).problems(split, limit=100, seed=3)
    assert len({question_hash(item.question) for item in many}) == 100
    assert many != gsm.problems(split, limit=100, seed=4)


def test_generated_splits_are_disjoint_across_seeds(gsm: Task):
    training = gsm.problems("training", 2000, seed=0)
    assert training == gsm.problems("train", 2000, seed=0)
    for split in ("calibration", "test"):
        others = gsm.problems(split, 300, seed=1)
        assert {split} == {split_of(item.question) for item in others} == {item.split for item in others}
        check_disjoint(training, others, f"training and {split}")


def test_generated_problems_have_only_small_whole_numbers(gsm: Task):
    for problem in gsm.problems("training", 300):
        text = problem.question + problem.extra["answer_cot"]
        numbers = [int(word) for word in "".join(c if c.isdigit() else " " for c in text).split()]
        assert max(numbers) <= 100
        assert "." not in problem.answer
        assert "Do not include units" not in problem.question
        assert problem.template in gsm.templates()
        assert problem.problem_id == f"gsm_symbolic-{question_hash(problem.question)}"


def test_generated_solutions_are_graded_right_and_their_negatives_wrong(gsm: Task):
    for problem in gsm.problems("test", 200):
        assert gsm.grade(problem, problem.extra["answer_cot"]).is_correct
        assert gsm.grade(problem, f"so it is \\boxed{{{problem.answer}.0}}").is_correct
        assert problem.answer == "0" or not gsm.grade(problem, f"#### -{problem.answer}").is_correct
        assert not gsm.grade(problem, f"#### {int(problem.answer) + 1}").is_correct


@pytest.mark.parametrize("name", ["chain_sum", "word_sorting", "countdown", "knights_knaves", "course_schedule"])
def test_a_problem_saved_as_json_is_graded_as_before(name: str):
    pytest.importorskip("reasoning_gym")
    task = load_task(f"rg:{name}")
    for problem in task.problems("training", 5):
        saved = Problem(**json.loads(json.dumps({key: getattr(problem, key) for key in problem.__slots__})))
        assert saved == problem
        assert task.grade(saved, f"<answer>{problem.answer}</answer>").is_correct
        assert not task.grade(saved, "#### nothing of the kind").is_correct


def test_another_right_answer_is_right_by_the_generators_own_rule():
    pytest.importorskip("reasoning_gym")
    task = load_task("rg:countdown")
    problem = task.problems("test", 1)[0]
    assert task.grade(problem, f"\\boxed{{({problem.answer})}}").is_correct


def test_a_generator_with_few_questions_ends(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr("s2t.tasks.reasoning.CHUNK_SIZE", 64)
    task = load_task("rg:chain_sum,min_terms=2,max_terms=2,min_digits=1,max_digits=1,allow_negation=false")
    found = task.problems("training", 100_000)
    assert 10 < len(found) < 1000


def test_generator_settings_are_checked():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="did you mean gsm_symbolic"):
        load_task("rg:gsm_symbolc")
    with pytest.raises(ConfigError, match="no setting 'terms'; expected one of max_number, min_terms"):
        load_task("rg:chain_sum,terms=3")
    with pytest.raises(ConfigError, match="refuses its settings"):
        load_task("rg:chain_sum,min_terms=0")
    with pytest.raises(ConfigError, match="no setting 'seed'"):
        load_task("rg:chain_sum,seed=3")
    with pytest.raises(ConfigError, match="max_number must be a whole number"):
        load_task("rg:gsm_symbolic,max_number=ten")


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, no_local_data: None):
    for module in ("reasoning_gym", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 's2t\[eval\]'"):
        load_task("rg:chain_sum")
    with pytest.raises(MissingExtraError, match=r"pip install 's2t\[eval\]'"):
        load_task("gsm8k").problems("test", 1)


def test_a_lone_file_is_divided_by_wording(tmp_path: Path):
    path = write_rows(tmp_path / "sums.jsonl", additions(200) + additions(5))
    task = load_task(f"{path},template=kind")
    found = {split: task.problems(split, 1000) for split in SPLITS}
    assert sum(len(problems) for problems in found.values()) == 200
    assert all(split_of(item.question) == split for split in SPLITS for item in found[split])
    assert task.templates() == ("k0", "k1", "k2")
    assert task.problems("training", 10, seed=5) == task.problems("training", 100, seed=5)[:10]
    assert task.grade(found["test"][0], f"The answer is {found['test'][0].answer}.0").is_correct


def test_fields_are_mapped_and_a_missing_one_is_named_by_line(tmp_path: Path):
    rows = [{"Body": f"There are {n} cows.", "Q": "How many?", "A": n / 2} for n in range(60)]
    path = write_rows(tmp_path / "cows.jsonl", rows)
    problem = load_task(f"{path},question=Body+Q,answer=A").problems("training", 1)[0]
    assert problem.question.endswith("cows. How many?")
    with pytest.raises(DataError, match=r"cows\.jsonl:1 has no field 'question'; it has Body, Q, A"):
        load_task(str(path)).problems("training", 1)
    path.write_text('{"question": "a", "answer": 1}\n\noops\n')
    with pytest.raises(DataError, match=r"cows\.jsonl:3 is not JSON"):
        load_task(str(path)).problems("training", 1)
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read"):
        load_task(str(tmp_path / "absent.jsonl")).problems("test", 1)


def test_own_train_and_test_files_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    test_rows = [{"question": row["question"], "answer": f"so\n#### {row['answer']}"} for row in additions(20)]
    write_rows(tmp_path / "gsm8k" / "test.jsonl", test_rows)
    write_rows(tmp_path / "gsm8k" / "train.jsonl", additions(300, "and") + test_rows[:5])
    monkeypatch.setenv("S2T_DATA_DIR", str(tmp_path))
    task = load_task("gsm8k")
    found = {split: task.problems(split, 1000) for split in SPLITS}
    assert len(found["test"]) == 20
    assert len(found["training"]) + len(found["calibration"]) == 300
    assert all(split_fraction(item.question) < 0.9 for item in found["training"])
    check_disjoint(found["training"] + found["calibration"], found["test"], "train and test files")
    assert {item.answer for item in found["test"]} == {str(n + 1) for n in range(20)}


def test_an_unreachable_hub_is_one_line_with_the_next_step(monkeypatch: pytest.MonkeyPatch, no_local_data: None):
    class Offline:
        @staticmethod
        def load_dataset(*args: object, **kwargs: object) -> None:
            raise ConnectionError("no route to host\nand a long story")

        get_dataset_split_names = load_dataset

    monkeypatch.setitem(sys.modules, "datasets", Offline)
    for spec in ("gsm8k", "hub:someone/something", "hub:someone/something,split=train"):
        with pytest.raises(DataError, match=r"cannot be read from the hub: no route to host; .*network") as caught:
            load_task(spec).problems("test", 1)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"put the files under \$S2T_DATA_DIR/gsm8k"):
        load_task("gsm8k").problems("test", 1)


def test_a_hub_dataset_uses_its_own_splits(monkeypatch: pytest.MonkeyPatch):
    tables = {"train": additions(100, "and"), "test": additions(30)}

    class Hub:
        @staticmethod
        def get_dataset_split_names(path: str, config: str | None) -> list[str]:
            return list(tables)

        @staticmethod
        def load_dataset(path: str, config: str | None, split: str) -> list[dict]:
            return tables[split]

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    assert len(load_task("hub:a/b").problems("test", 1000)) == 30
    by_wording = load_task("hub:a/b,split=train")
    assert sum(len(by_wording.problems(split, 1000)) for split in SPLITS) == 100
    with pytest.raises(ConfigError, match="no option 'splt'"):
        load_task("hub:a/b,splt=train")


def test_prompt_styles_ask_the_question(tmp_path: Path):
    path = str(write_rows(tmp_path / "x.jsonl", additions(50)))
    plain, cot = load_task(path), load_task(path, "cot")
    problem = plain.problems("training", 1)[0]
    assert plain.prompt(problem) == problem.question
    assert cot.prompt(problem) == (
        problem.question + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    with pytest.raises(ConfigError, match="prompt must be one of plain, cot"):
        load_task(path, "auto")


def test_usage_mistakes_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"unknown task 'gsm8'; .*did you mean gsm8k"):
        load_task("gsm8")
    with pytest.raises(ConfigError, match="must be key=value"):
        load_task("x.jsonl,question")
    path = write_rows(tmp_path / "x.jsonl", additions(1))
    with pytest.raises(ConfigError, match="split must be one of training, calibration, test; got 'dev'"):
        load_task(str(path)).problems("dev", 1)
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        load_task(str(path)).problems("test", 0)
    with pytest.raises(DataError, match="no problems in split"):
        [load_task(str(path)).problems(split, 1) for split in SPLITS]


@needs_data
def test_benchmark_files_have_their_published_sizes():
    sizes = {"gsm8k": 1319, "svamp": 1000, "amc23": 40, "aime24": 30, "olympiadbench": 675}
    for name, size in sizes.items():
        problems = load_task(name).problems("test", 10_000)
        assert len(problems) == size
        assert all(item.answer and item.question for item in problems)


@needs_data
def test_gsm8k_train_file_is_divided_and_disjoint_from_test():
    task = load_task("gsm8k")
    found = {split: task.problems(split, 10_000) for split in SPLITS}
    assert len(found["training"]) + len(found["calibration"]) == 7473
    check_disjoint(found["training"], found["calibration"], "training and calibration")
    check_disjoint(found["training"] + found["calibration"], found["test"], "train and test")
    assert all(item.answer.replace(",", "").lstrip("-").isdecimal() for items in found.values() for item in items)


def test_a_whole_file_may_be_one_split(tmp_path):
    path = write_rows(tmp_path / "own.jsonl", additions(30))
    assert len(load_task(f"{path},split=test").problems("test", 100)) == 30
    with pytest.raises(DataError, match="no problems in split 'training'"):
        load_task(f"{path},split=test").problems("train", 100)
    parts = [len(load_task(f"{path},split=train").problems(split, 100)) for split in ("train", "calibration")]
    assert sum(parts) == 30
    assert parts[0] > parts[1] > 0
    with pytest.raises(ConfigError, match="split must be train or test"):
        load_task(f"{path},split=calibration")
