"""What a task is: problems in disjoint splits, a prompt, a grade; and how a task spec becomes one.

A problem's own wording decides its split, so splits are disjoint whatever the seed or the order. Knows no
models, and leaves where problems come from to its neighbours.
"""

from __future__ import annotations

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice

from s2t.errors import ConfigError, DataError, OverlapError
from s2t.records import Grade, Problem
from s2t.tasks.graders import canonical_answer
from s2t.tasks.sandbox import check_allowed

SPLITS = ("training", "calibration", "test")
PROMPTS = ("plain", "cot")
QUESTION = "{question}"

KINDS = ("math", "choice", "code")
_COT_SUFFIXES = {
    "math": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "choice": "\nPlease reason step by step, and put the letter of your choice within \\boxed{}.",
    "code": "\n\nComplete the function above. Write nothing but code: the whole function and the imports that it "
    "needs, in one ```python block.",
}
_SPLIT_ALIASES = {"train": "training"}
_HASH_LENGTH = 16


class Task(ABC):
    """Problems of one kind: where they come from, how they are asked and how an answer is graded."""

    kind = "math"
    """What an answer is: a value (math), the letter of a choice, or code."""

    def __init__(self, name: str, prompt_style: str = "plain") -> None:
        if prompt_style not in PROMPTS and QUESTION not in prompt_style:
            raise ConfigError(f"prompt must be one of {', '.join(PROMPTS)}, or hold {QUESTION}; got {prompt_style!r}.")
        self.name = name
        self.prompt_style = prompt_style

    def problems(self, split: str, limit: int, seed: int = 0) -> list[Problem]:
        """The first `limit` distinct problems of a split in the seed's order; fewer when there are no more.

        `train` is another name of the split `training`. A smaller limit gives a prefix of a larger one.
        ConfigError for an unknown split or a limit below 1, DataError when the split is empty.
        """
        name = split_name(split)
        if limit < 1:
            raise ConfigError(f"limit must be at least 1; got {limit}.")
        found = list(islice(_distinct(self.stream(name, seed)), limit))
        if not found:
            raise DataError(f"task {self.name} has no problems in split {name!r}; choose another split.")
        return found

    @abstractmethod
    def stream(self, split: str, seed: int) -> Iterator[Problem]:
        """The problems of a split in the seed's order, lazily; the order depends on nothing but the seed."""

    @abstractmethod
    def grade(self, problem: Problem, text: str) -> Grade:
        """Whether the answer stated in a text is right."""

    def templates(self) -> tuple[str, ...]:
        """Names of all question templates; empty when the task has none."""
        return ()

    def prompt(self, problem: Problem) -> str:
        """The user message: the question, under `cot` with the request to reason and box the answer, or for code.

        A prompt style that holds `{question}` is the message itself, with the question in its place.
        """
        if QUESTION in self.prompt_style:
            return self.prompt_style.replace(QUESTION, problem.question)
        return problem.question + (_COT_SUFFIXES[self.kind] if self.prompt_style == "cot" else "")

    def check_gradable(self) -> None:
        """Raise ConfigError when answers could not be graded here: code runs only where that is allowed."""
        if self.kind == "code":
            check_allowed()

    def canonical(self, answer_text: str | None) -> str | None:
        """The form in which extracted answers vote; None for no answer."""
        return canonical_answer(answer_text)


def split_fraction(question: str) -> float:
    """Where a question falls in [0, 1): a hash of its words, blind to white space."""
    return int.from_bytes(_digest(question), "big") / 2**64


def split_of(question: str) -> str:
    """The split a question belongs to by its wording: 80 % training, 10 % calibration, 10 % test."""
    fraction = split_fraction(question)
    if fraction < 0.8:
        return "training"
    return "calibration" if fraction < 0.9 else "test"


def split_name(split: str) -> str:
    """The one name of a split, given any of its names; ConfigError for an unknown one."""
    name = _SPLIT_ALIASES.get(split, split)
    if name not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    return name


def question_hash(question: str) -> str:
    """16 hexadecimal characters that identify a question, blind to white space."""
    return _digest(question).hex()


def split_digest(problems: Iterable[Problem]) -> str:
    """16 hexadecimal characters that identify a set of problems by their questions, whatever their order."""
    return _digest(" ".join(sorted(question_hash(problem.question) for problem in problems))).hex()


def check_disjoint(left: Iterable[Problem | str], right: Iterable[Problem | str], what: str) -> None:
    """Raise OverlapError when the two sides share a question; `what` names the sides in the message.

    A side is made of problems, problem ids or question hashes.
    """
    lefts = {_hash_of(item): item for item in left}
    shared = sorted({_hash_of(item) for item in right} & lefts.keys())
    if shared:
        named = [lefts[key] for key in shared[:3]]
        names = ", ".join(item.problem_id if isinstance(item, Problem) else item for item in named)
        more = ", ..." if len(shared) > 3 else ""
        raise OverlapError(
            f"{what} must share no problem; {len(shared)} found in both: {names}{more}; use different splits."
        )


def heldout_templates(templates: Iterable[str], share: float) -> frozenset[str]:
    """The templates kept out of training: the first round(share * n) in hash order.

    At least one is held out when share > 0, and at least one is left; a lone template is never held out.
    A function of the names alone, so every command agrees on it; a larger share holds out a superset.
    """
    ranked = sorted(set(templates), key=lambda name: (_digest(name), name))
    if share <= 0 or len(ranked) < 2:
        return frozenset()
    count = min(max(1, round(share * len(ranked))), len(ranked) - 1)
    return frozenset(ranked[:count])


def load_task(spec: str, prompt: str = "plain") -> Task:
    """The task that a spec names, its problems asked in a prompt style (plain, cot, or a text with `{question}` in it).

    Specs: `rg:NAME[,key=value]` (a reasoning-gym generator), a named benchmark such as `gsm8k`,
    `hub:OWNER/NAME[,config=,split=,FIELDS]`, `path.jsonl[,FIELDS]`, where FIELDS are question=, answer=, template=,
    tolerance=, and for multiple choice choices=, for code test= and entry_point=.
    ConfigError when the spec names nothing.
    """
    from s2t.tasks import datasets, reasoning

    kind, _, rest = spec.partition(":")
    if kind == "rg":
        return reasoning.load_generator(rest, prompt)
    if kind == "hub":
        return datasets.load_hub(rest, prompt)
    if spec.partition(",")[0].endswith(".jsonl"):
        return datasets.load_jsonl(spec, prompt)
    if spec in datasets.NAMED:
        return datasets.load_named(spec, prompt)
    raise ConfigError(
        f"unknown task {spec!r}; expected rg:NAME, hub:OWNER/NAME, a .jsonl path"
        f" or one of {', '.join(datasets.NAMED)}{did_you_mean(spec, datasets.NAMED) or '.'}"
    )


def make_problem(task: str, split: str, question: str, answer: str, **fields: object) -> Problem:
    """A problem with the id that its question gives it."""
    return Problem(f"{task}-{question_hash(question)}", task, split, question, answer, **fields)  # type: ignore[arg-type]


def parse_spec(spec: str) -> tuple[str, dict[str, str]]:
    """Split `head,key=value,...` into the head and its options; ConfigError for a part without `=`."""
    head, *parts = spec.split(",")
    options = {}
    for part in parts:
        key, mark, value = part.partition("=")
        if not mark or not key.strip():
            raise ConfigError(f"task option {part!r} of {spec!r} must be key=value; fix the spec.")
        options[key.strip()] = value.strip()
    return head.strip(), options


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line that offers the closest known names, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _distinct(problems: Iterable[Problem]) -> Iterator[Problem]:
    seen: set[str] = set()
    for problem in problems:
        if problem.problem_id not in seen:
            seen.add(problem.problem_id)
            yield problem


def _hash_of(item: Problem | str) -> str:
    return question_hash(item.question) if isinstance(item, Problem) else item[-_HASH_LENGTH:]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(" ".join(text.split()).encode(errors="surrogatepass"), digest_size=8).digest()
