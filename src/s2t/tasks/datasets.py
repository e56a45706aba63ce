"""Tasks from files: named benchmarks, other datasets of the Hugging Face hub, and local JSONL files.

A source with its own test file keeps it as the test split and divides its train file; a lone file is split by
wording. A named benchmark under $S2T_DATA_DIR is read from there, else from the hub.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from s2t.errors import ConfigError, DataError, missing_extra
from s2t.hub import offline_unless_it_answers
from s2t.records import Grade, Problem
from s2t.tasks import fields
from s2t.tasks.choices import gold_letter, grade_choice, with_choices
from s2t.tasks.graders import extract_answer, grade_math
from s2t.tasks.problems import KINDS, Task, make_problem, parse_spec, question_hash, split_fraction, split_of
from s2t.tasks.programs import grade_program

DATA_DIR = "S2T_DATA_DIR"
_TRAIN_SHARE = 0.9  # of a train file; the rest is the calibration split

Row = fields.Row
Readers = dict[str, Callable[[], list[Row]]]  # role (train, calibration, test or all) -> what reads its rows
_ROLES = ("train", "calibration", "test")
_FIELDS = ("question", "answer", "template", "tolerance", "choices", "test", "entry_point", "kind")


@dataclass(frozen=True)
class Source:
    """Where a dataset lives on the hub and which of its fields mean what."""

    hub_id: str
    config: str | None = None
    question: tuple[str, ...] = ("question",)
    """Fields joined by a space."""
    answer: str = "answer"
    template: str | None = None
    tolerance: str | None = None
    """Field with the absolute error allowed, where the benchmark states one."""
    splits: dict[str, str] = field(default_factory=lambda: {"test": "test"})
    """Role (train, calibration, test, all) -> split on the hub; `all` is divided by wording, and so is `train`
    where there is no `calibration`."""
    kind: str = "math"
    choices: str = "choices"
    """Field with the choices: a list of texts, or a mapping with `text` and `label`."""
    test: str = "test"
    """Field with the tests of a code problem: a text or a list of texts."""
    entry_point: str | None = None
    """Field with the name of the function that the tests call; without it the tests are run as they are."""


_TRAIN_AND_TEST = {"train": "train", "test": "test"}
NAMED = {
    "gsm8k": Source("openai/gsm8k", "main", splits=_TRAIN_AND_TEST),
    "math500": Source("HuggingFaceH4/MATH-500", None, ("problem",)),
    "svamp": Source("ChilleD/SVAMP", None, ("Body", "Question"), "Answer", splits=_TRAIN_AND_TEST),
    "amc23": Source("math-ai/amc23"),
    "aime24": Source("HuggingFaceH4/aime_2024", None, ("problem",), splits={"test": "train"}),
    "aime25": Source("math-ai/aime25", None, ("problem",)),
    "olympiadbench": Source(
        "Hothan/OlympiadBench",
        "OE_TO_maths_en_COMP",
        answer="final_answer",
        tolerance="error",
        splits={"test": "train"},
    ),
    "mmlu_pro": Source(
        "TIGER-Lab/MMLU-Pro", splits={"calibration": "validation", "test": "test"}, kind="choice", choices="options"
    ),
    "arc_challenge": Source(
        "allenai/ai2_arc",
        "ARC-Challenge",
        answer="answerKey",
        splits={"train": "train", "calibration": "validation", "test": "test"},
        kind="choice",
    ),
    "humaneval": Source(
        "openai/openai_humaneval",
        None,
        ("prompt",),
        "canonical_solution",
        kind="code",
        entry_point="entry_point",
    ),
}


class FileTask(Task):
    """Problems of a finite source; `find_readers` is asked once, when the first problem is wanted."""

    def __init__(
        self, name: str, source: Source, find_readers: Callable[[], Readers], prompt_style: str = "plain"
    ) -> None:
        super().__init__(name, prompt_style)
        self.source, self.kind = source, source.kind
        self._find_readers = find_readers

    def stream(self, split: str, seed: int) -> Iterator[Problem]:
        """The split's problems, shuffled by the seed."""
        problems = [problem for problem in self._problems if problem.split == split]
        random.Random(seed).shuffle(problems)
        return iter(problems)

    def templates(self) -> tuple[str, ...]:
        """The values of the template field, sorted; empty when none is mapped."""
        return tuple(sorted({item.template for item in self._problems if item.template is not None}))

    def grade(self, problem: Problem, text: str) -> Grade:
        """By value (exactly for plain numbers, else by math-verify), by letter, or by the problem's tests."""
        extra = problem.extra
        if self.kind == "choice":
            return grade_choice(problem.answer, text, extra["choices"])
        if self.kind == "code":
            return grade_program(problem.question, text, extra["test"], extra.get("entry_point"))
        return grade_math(problem.answer, text, extra.get("tolerance"))

    def canonical(self, answer_text: str | None) -> str | None:
        """The form in which answers vote; code votes as it stands."""
        return answer_text if self.kind == "code" else super().canonical(answer_text)

    @cached_property
    def _problems(self) -> list[Problem]:
        readers = self._find_readers()
        rows = {role: [self._problem(row) for row in read()] for role, read in readers.items()}
        found = [_in_split(problem, split_of(problem.question)) for problem in rows.get("all", [])]
        taken: set[str] = set()
        for role in ("test", "calibration", "train"):  # a train file may repeat a test question
            for problem in rows.get(role, []):
                if role == "test" or question_hash(problem.question) not in taken:
                    is_training = "calibration" in rows or split_fraction(problem.question) < _TRAIN_SHARE
                    split = role if role != "train" else "training" if is_training else "calibration"
                    found.append(_in_split(problem, split))
            taken |= {question_hash(problem.question) for problem in rows.get(role, [])}
        return found

    def _problem(self, row: Row) -> Problem:
        where, values = row
        source = self.source
        separator = "\n" if source.kind == "code" else " "
        question = separator.join(fields.text(values, name, where) for name in source.question)
        template = None if source.template is None else fields.text(values, source.template, where)
        question, gold, extra = _READ_KIND[source.kind](source, question, values, where)
        return make_problem(self.name, "", question, gold, template=template, extra=extra)


Asked = tuple[str, str, dict[str, Any]]  # the question as it is asked, the gold answer, what its grader needs


def _math(source: Source, question: str, values: dict[str, Any], where: str) -> Asked:
    tolerance = fields.tolerance(values, source.tolerance, where)
    extra = {} if tolerance is None else {"tolerance": tolerance}
    return question, _gold(fields.text(values, source.answer, where)), extra


def _choice(source: Source, question: str, values: dict[str, Any], where: str) -> Asked:
    choices, labels = fields.choices(values, source.choices, where)
    try:
        gold = gold_letter(values.get(source.answer), choices, labels)
        return with_choices(question, choices), gold, {"choices": choices}
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _code(source: Source, question: str, values: dict[str, Any], where: str) -> Asked:
    tests = fields.lines(values, source.test, where)
    entry_point = None if source.entry_point is None else fields.identifier(values, source.entry_point, where)
    gold = fields.text(values, source.answer, where)
    return question, gold, {"test": tests, "entry_point": entry_point}


_READ_KIND: dict[str, Callable[[Source, str, dict[str, Any], str], Asked]] = {
    "math": _math,
    "choice": _choice,
    "code": _code,
}


def load_named(name: str, prompt_style: str = "plain") -> FileTask:
    """A benchmark of the table, from $S2T_DATA_DIR/<name>/{train,calibration,test}.{jsonl,parquet} or the hub."""
    source = NAMED[name]

    def readers() -> Readers:
        hub = {role: _hub_reader(source, split, name) for role, split in source.splits.items()}
        return _local_readers(name) or hub

    return FileTask(name, source, readers, prompt_style)


def load_hub(spec: str, prompt_style: str = "plain") -> FileTask:
    """`OWNER/NAME[,config=,split=]` and the fields of `load_jsonl`; a named split is divided by wording.

    Without `split`, the dataset's own train and test splits are used; a lone train split is divided.
    """
    hub_id, options = parse_spec(spec)
    if hub_id.count("/") != 1:
        raise ConfigError(f"a hub task must be hub:OWNER/NAME; got hub:{hub_id}.")
    split = options.pop("split", None)
    source = _mapped(Source(hub_id), options, ("config", *_FIELDS), f"hub:{hub_id}")

    def readers() -> Readers:
        names = {"all": split} if split else _hub_roles(source)
        return {role: _hub_reader(source, name, None) for role, name in names.items()}

    return FileTask(hub_id, source, readers, prompt_style)


def load_jsonl(spec: str, prompt_style: str = "plain") -> FileTask:
    """`path.jsonl[,question=field,answer=field,template=field,...]`, divided by wording; `a+b` joins fields.

    `choices=field` makes it multiple choice, `test=field` (and `entry_point=field`) code; `kind=choice` or
    `kind=code` does the same with the fields `choices` and `test`. `split=test` makes the whole file test problems,
    `split=train` training (and, one in ten, calibration) problems.
    """
    path_text, options = parse_spec(spec)
    path = Path(path_text).expanduser()
    role = options.pop("split", "all")
    if role not in ("all", "train", "test"):
        raise ConfigError(f"task {path_text}: split must be train or test, or left out; got {role!r}.")
    source = _mapped(Source(str(path)), options, _FIELDS, path_text)

    def read() -> list[Row]:
        if rows := fields.read_rows(path):
            return rows
        raise DataError(f'{path} is empty; give one problem per line, such as {{"question": "1 + 1?", "answer": "2"}}.')

    return FileTask(path.stem, source, lambda: {role: read}, prompt_style)


def _mapped(source: Source, options: dict[str, str], known: tuple[str, ...], what: str) -> Source:
    for key in options:
        if key not in known:
            raise ConfigError(f"task {what} has no option {key!r}; expected one of {', '.join(known)}.")
    implied = "choice" if "choices" in options else "code" if "test" in options else "math"
    kind = options.get("kind", implied)
    if kind not in KINDS:
        raise ConfigError(f"task {what}: kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    plain = {key: value for key, value in options.items() if key not in ("question", "kind")}
    return replace(source, question=tuple(options.get("question", "question").split("+")), kind=kind, **plain)


def _local_readers(name: str) -> Readers:
    root = os.environ.get(DATA_DIR)
    if not root:
        return {}
    found: Readers = {}
    for role in _ROLES:
        stem = Path(root) / name / role
        if stem.with_suffix(".jsonl").is_file():
            found[role] = partial(fields.read_rows, stem.with_suffix(".jsonl"))
        elif stem.with_suffix(".parquet").is_file():
            found[role] = partial(_read_parquet, stem.with_suffix(".parquet"))
    return found


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet as pq
    from pyarrow import ArrowException

    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as parquet: {reason}; get it again.") from error
    return [(f"{path.name} row {index}", row) for index, row in enumerate(rows)]


def _hub_reader(source: Source, split: str, local_name: str | None) -> Callable[[], list[Row]]:
    def read() -> list[Row]:
        where = f"{source.hub_id} ({split})"
        path, config = source.hub_id, source.config
        rows = _from_hub(source, local_name, lambda hub: hub.load_dataset(path, config, split=split))
        return [(f"{where} row {index}", dict(row)) for index, row in enumerate(rows)]

    return read


def _hub_roles(source: Source) -> dict[str, str]:
    names = _from_hub(source, None, lambda hub: hub.get_dataset_split_names(source.hub_id, source.config))
    if "test" in names:
        return {role: role for role in ("train", "test") if role in names}
    if len(names) == 1:
        return {"all": names[0]}
    raise ConfigError(f"hub:{source.hub_id} has the splits {', '.join(names)}; choose one with split=NAME.")


def _from_hub(source: Source, local_name: str | None, ask: Callable[[Any], Any]) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "eval") from error
    try:
        with offline_unless_it_answers():
            return ask(datasets)
    except Exception as error:  # the hub client raises many kinds: network, name, config, split
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        local = f"put the files under ${DATA_DIR}/{local_name}, or " if local_name else ""
        raise DataError(
            f"{source.hub_id} cannot be read from the hub: {reason}; {local}check the name and the network."
        ) from error


def _in_split(problem: Problem, split: str) -> Problem:
    return make_problem(
        problem.task, split, problem.question, problem.answer, template=problem.template, extra=problem.extra
    )


def _gold(answer: str) -> str:
    """The final answer in an answer field: after the last `####`, else boxed, else the whole field."""
    if "####" in answer or "\\boxed{" in answer:
        return extract_answer(answer, gold_is_number=False) or answer
    text = answer.strip()
    whole = text.removesuffix(".0")
    return whole if whole.lstrip("-").isdecimal() else text
