"""Tasks from reasoning-gym: endless generated problems with a known answer, split by their wording.

The generator's own scorer grades, after the answer has been read from the text. Knows the library's
interface and little of any one generator, `gsm_symbolic` excepted.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from typing import Any

from s2t.errors import ConfigError, missing_extra
from s2t.records import Grade, Problem
from s2t.tasks import judge
from s2t.tasks.graders import extract_answer, parse_number
from s2t.tasks.problems import Task, did_you_mean, make_problem, parse_spec, question_hash, split_of

CHUNK_SIZE = 4096
MAX_BARREN_CHUNKS = 3  # so many chunks without a new problem of the split: the generator has no more
_SEED_STRIDE = 1_000_003
_TEMPLATE_SAMPLE = 20_000
_SUFFIX = " Give the result as your final answer. Do not include units."
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_INTEGER = re.compile(r"-?\d+")
_CORRECT_SCORE = 0.99
_NONSENSE = "nothing of the kind"


class ReasoningTask(Task):
    """Problems of one reasoning-gym generator; `max_number` keeps those of whole numbers up to it."""

    def __init__(
        self, name: str, settings: dict[str, Any], max_number: int | None = None, prompt_style: str = "plain"
    ) -> None:
        super().__init__(name, prompt_style)
        self.settings = settings
        self.max_number = max_number
        self._dataset(seed=0, size=1)  # an unusable setting is the user's mistake: say so now

    def stream(self, split: str, seed: int) -> Iterator[Problem]:
        """Generated problems of the split, chunk after chunk, until chunks bring nothing new."""
        seen: set[str] = set()
        chunk, barren = 0, 0
        while barren < MAX_BARREN_CHUNKS:
            known = len(seen)
            for problem in self._items(seed * _SEED_STRIDE + chunk * CHUNK_SIZE, CHUNK_SIZE):
                key = question_hash(problem.question)
                if problem.split == split and key not in seen:
                    seen.add(key)
                    yield problem
            barren = 0 if len(seen) > known else barren + 1
            chunk += 1

    def templates(self) -> tuple[str, ...]:
        """The templates of `gsm_symbolic` that the settings let through; empty for other generators."""
        return self._templates

    def grade(self, problem: Problem, text: str) -> Grade:
        """Right when the answer read from the text is the gold one, or scores 0.99 with the generator."""
        gold = parse_number(problem.answer)
        extracted = extract_answer(text, gold is not None)
        if extracted is None:
            return Grade(False, None)
        if extracted.strip() == problem.answer.strip():
            return Grade(True, extracted)
        value = parse_number(extracted)
        if gold is not None and (value == gold or self.name == "gsm_symbolic"):
            return Grade(value == gold, extracted)  # the scorer of gsm_symbolic would overlook a sign
        return Grade(self._is_content(problem, extracted), extracted)

    @cached_property
    def _templates(self) -> tuple[str, ...]:
        if self.name != "gsm_symbolic":
            return ()
        found = {problem.template for problem in self._items(seed=0, size=_TEMPLATE_SAMPLE)}
        return tuple(sorted((name for name in found if name is not None), key=int))

    def _is_content(self, problem: Problem, answer: str) -> bool:
        """Whether the generator's scorer takes the answer; one that takes nonsense, too, is not believed."""
        if self._score(problem, answer) < _CORRECT_SCORE:
            return False
        return self._score(problem, _NONSENSE) < _CORRECT_SCORE or answer.casefold() == problem.answer.casefold()

    def _score(self, problem: Problem, answer: str) -> float:
        """The generator's own score, 0 where its scorer breaks or takes too long: the text is a model's."""
        stored = problem.extra.get("entry") or {"answer": problem.answer, "metadata": {}}
        entry = {"question": problem.question, **stored}
        value = judge.ask(
            "reasoning_gym", kind="score", name=self.name, settings=self.settings, entry=entry, answer=answer
        )
        return 0.0 if value is None else value

    def _items(self, seed: int, size: int) -> Iterator[Problem]:
        dataset = self._dataset(seed, size)
        for index in range(size):
            with _settings_of(self.name):
                entry = dataset[index]
            if self.name == "gsm_symbolic":
                problem = _gsm_problem(self.name, entry, str(dataset.task_indices[index]))
            else:
                problem = _plain_problem(self.name, entry)
            if self.max_number is None or _has_small_numbers(problem, self.max_number):
                yield problem

    def _dataset(self, seed: int, size: int) -> Any:
        factory, config_class = _registered(self.name)
        with _settings_of(self.name), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the data of some is read from files left open
            config = config_class(**_parts(self.name, self.settings), seed=seed, size=size)
            getattr(config, "validate", bool)()  # some check themselves when they are made
            return factory(config=config)


@contextmanager
def _settings_of(name: str) -> Iterator[None]:
    """What a generator throws at its settings, as one line: asserts, errors of lookup, of types, of values."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"task rg:{name} refuses its settings: {reason}; fix them.") from error


def load_generator(spec: str, prompt_style: str = "plain") -> ReasoningTask:
    """The task of `NAME[,key=value,...]`; ConfigError for an unknown generator or setting.

    `max_number` is ours: it keeps the problems whose numbers are all whole and no larger. Every other key
    is a field of the generator's own config. Raises MissingExtraError without reasoning-gym.
    """
    name, options = parse_spec(spec)
    limit = _max_number(options.pop("max_number", None))
    _, config_class = _registered(name)
    known = [item.name for item in fields(config_class) if item.name not in ("seed", "size")]
    for key in options:
        if key not in known:
            expected = ", ".join(["max_number", *known])
            raise ConfigError(f"task rg:{name} has no setting {key!r}; expected one of {expected}.")
    return ReasoningTask(name, {key: _value(text) for key, text in options.items()}, limit, prompt_style)


def _registered(name: str) -> tuple[Any, Any]:
    try:
        import reasoning_gym  # noqa: F401  (fills the registry)
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise missing_extra("reasoning-gym", "eval") from error
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS) or f"; known: {', '.join(sorted(DATASETS)[:5])}, ..."
        raise ConfigError(f"reasoning-gym has no generator {name!r}{hint}")
    return DATASETS[name]


def _gsm_problem(task: str, entry: dict[str, Any], template: str) -> Problem:
    question = entry["question"].removesuffix(_SUFFIX)
    extra = {"answer_cot": entry["metadata"]["answer_cot"]}
    return make_problem(task, split_of(question), question, entry["answer"], template=template, extra=extra)


def _plain_problem(task: str, entry: dict[str, Any]) -> Problem:
    question, answer = entry["question"], entry["answer"]
    stored = _json_safe({"answer": answer, "metadata": entry.get("metadata", {})})
    gold = "" if answer is None else str(answer)
    return make_problem(task, split_of(question), question, gold, extra={"entry": stored})


def _has_small_numbers(problem: Problem, max_number: int) -> bool:
    if not _INTEGER.fullmatch(problem.answer):
        return False
    text = f"{problem.question} {problem.extra.get('answer_cot', '')} {problem.answer}"
    return all(_is_small(number, max_number) for number in _NUMBER.findall(text))


def _is_small(number: str, max_number: int) -> bool:
    digits = number.rstrip(",")  # a comma at the end belongs to the sentence
    return digits.isdecimal() and int(digits) <= max_number


def _json_safe(value: Any) -> Any:
    """The value as JSON gives it back; a value without JSON form becomes null, such a key is dropped."""
    return json.loads(json.dumps(value, default=lambda _: None, skipkeys=True))


def _parts(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as the generator wants them: the parts of a composite one are named "chain_sum+word_sorting"."""
    if name != "composite":
        return settings
    from reasoning_gym.composite import DatasetSpec

    names = str(settings.get("datasets") or "").split("+")
    if not all(names):
        raise ValueError("it needs datasets=NAME+NAME")
    return settings | {"datasets": [DatasetSpec(part, 1.0, {}) for part in names]}


def _max_number(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"max_number must be a whole number above 0; got {text!r}.")
    return int(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)
