"""Multiple choice: letters for the choices of a question, and the letter that an answer states.

Knows no datasets and no mathematics; the letter is read, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any
from unicodedata import normalize

from s2t.errors import DataError
from s2t.records import Grade
from s2t.tasks.extraction import marked_segments
from s2t.tasks.thinking import without_thinking

_ANSWER = re.compile(
    r"\b(?:(?:correct|right|best|final)\s+)?(?:answer|choice|option|letter|correct)s?\b[*_\s]*"
    r"(?:(?:to|for)\s[^.:\n]{0,60}?)?(?:is|would\s+be|must\s+be|should\s+be|:|=)\s*:?",
    re.IGNORECASE,
)
_CHOOSE = re.compile(
    r"\b(?:choose|select|pick|go(?:ing)? with|only|so|thus|hence|therefore)\b,?\s+(?:(?:option|choice|answer|letter)\s+)?",
    re.IGNORECASE,
)
_IS_RIGHT = re.compile(
    r"(?:\b(?:option|choice|answer)\s+\(?([A-Z])\)?|\(([A-Z])\)|(?<![\w'])([B-HJ-Z]))[)*.\s]*"
    r"(?:is|looks|must\s+be|seems)\s+(?:(?:the|clearly|therefore|indeed)\s+)*(?:correct|right|best|true|answer)\b"
)
_IT_IS = re.compile(
    r"\bit(?:'s|’s|\s+is|\s+must\s+be|\s+has\s+to\s+be)\s+(?=option\s|choice\s|\(|[A-Z]\b)", re.IGNORECASE
)
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|mbox|bf|rm|boxed|fbox)\b|\\[()\[\]!,;: ]|[${}*_`\"“”‘’]|~")
_STATED = re.compile(
    r"(?i:(?:(?:the|an?)\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?(?:option|choice|letter|answer)\s*:?\s*)?"
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])(?![A-Za-z0-9'’^+*/=_-]))"
)
_ANOTHER = re.compile(
    r"\s*(?:(?:[,;]\s*)?(?:/|&|\band\b|\bor\b)\s*(?:option\s|choice\s)?\s*\(?([A-Z])\b(?!['’])"
    r"|[,;]\s*\(?([A-Z])\b\)?(?![)'’])(?!\s*[a-z]{3}))"
)
_ALONE = re.compile(r"['(\[]?([A-Z])['\]).:]*|[(\[]([a-z])[)\]]\.?")
_BEHIND = re.compile(r"(.+?)\s*\((?:option\s+|choice\s+)?([A-Z])\)\.?", re.IGNORECASE)
_WITH_TEXT = re.compile(r"\(?([A-Z])\s?(?:\)|\.|:)\s*(.+)")
_CONNECTIVE = re.compile(r"(?:only|so|thus|hence|therefore)\b", re.IGNORECASE)
_SAID_OF = re.compile(  # "so B is wrong" states no answer, "so B is right" does
    r"^[^.;:\n]*?\b(?:is|are|was|were|isn['’]t|aren['’]t|cannot|can['’]t|can|comes?|does|doesn['’]t|do|would|has|have|fails?|seems?|looks?)\b(?!\s+"
    r"(?:(?:the|clearly|indeed|then|definitely)\s+)*(?:correct|right|best|true|answer)\b)"
)
_REASON = re.compile(r"\b(?:because|since|as|due)\b")
_STATEMENT = 400  # characters behind "the answer is" that may state it
_WORDS = {"A", "I"}  # letters that are words, too, unless a reason follows
_WORD_AFTER = re.compile(r"\s+(?!(?:because|since|as|due|for|which|not)\b)[A-Za-z]")


def letters(count: int) -> str:
    """The letters of a question with so many choices, from A on; DataError above 26."""
    if not 2 <= count <= len(ascii_uppercase):
        raise DataError(f"a question needs 2 to 26 choices; got {count}; check the choices field.")
    return ascii_uppercase[:count]


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with one line per choice, lettered."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(letters(len(choices)), choices, strict=True)]
    return "\n".join([question, *lines])


def gold_letter(gold: Any, choices: Sequence[str], labels: Sequence[str] | None = None) -> str:
    """The letter of a gold answer: a whole number counts from 0, a text is a label, a letter or the choice itself.

    DataError when it is none of these.
    """
    known = letters(len(choices))
    if isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(choices):
        return known[gold]
    text = type(gold).__name__ if isinstance(gold, (dict, list)) else str(gold).strip()
    for names in (labels, known, choices):
        if names is not None and text in list(names):
            return known[list(names).index(text)]
    raise DataError(f"the gold answer {text[:80]!r} is none of the {len(choices)} choices; check the answer field.")


def grade_choice(gold: str, text: str, choices: Sequence[str]) -> Grade:
    """Right when the letter that the text states is the gold one; a text that states none, or two, is wrong."""
    letter = extract_choice(text, choices)
    return Grade(letter == gold, letter)


def extract_choice(text: str, choices: Sequence[str]) -> str | None:
    r"""The letter that a text states last; None when it states none.

    Looked for in this order: after `####`, in the last `\boxed{}` or `<answer>` tag (a letter, or a choice
    word for word), after "answer is" and its like, before "is correct", alone on a line, in brackets. Thinking is
    no part of the text.
    """
    known, text = letters(len(choices)), normalize("NFKC", without_thinking(text))
    segments = [segment for segment in marked_segments(text) if segment.strip()]
    if segments:
        return _stated(segments[0], known, choices)
    phrases = [match for pattern in (_ANSWER, _CHOOSE, _IT_IS) for match in pattern.finditer(text)]
    for match in sorted(phrases, key=lambda match: match.end(), reverse=True):
        rest = text[match.end() : match.end() + _STATEMENT].lstrip().split("\n", 1)[0]
        if _CONNECTIVE.match(match[0]) and _SAID_OF.match(_REASON.split(rest, maxsplit=1)[0]):
            continue
        if found := _stated(rest, known, choices):
            return found
    return _last(_IS_RIGHT, text, known) or _alone(text, known, choices)


def _stated(segment: str, known: str, choices: Sequence[str]) -> str | None:
    """The letter at the start of a segment, or of the choice that the segment is; None for two letters."""
    plain = " ".join(_MARKUP.sub(" ", segment.replace("\\ ", " ")).split()).strip()
    match = _STATED.match(plain)
    letter = (match[1] or match[2] or match[3]).upper() if match else None
    if match is None and re.fullmatch(r"[a-z]\b[).]*", plain):
        return _known(plain[0].upper(), known)
    rest = plain[match.end() :] if match else ""
    is_word = match is not None and match[3] in _WORDS and _WORD_AFTER.match(rest) is not None
    another = _ANOTHER.match(rest)
    if another is not None and (another[1] or another[2]) in known.replace(letter or "", ""):
        return None
    if letter is not None and letter in known and not is_word:
        return letter
    if (behind := _BEHIND.fullmatch(plain)) and _same_choice(behind[1], known, choices) == behind[2]:
        return behind[2]
    return _same_choice(plain, known, choices)


def _same_choice(plain: str, known: str, choices: Sequence[str]) -> str | None:
    wanted = _bare(plain)
    found = [letter for letter, choice in zip(known, choices, strict=True) if _bare(choice) == wanted]
    return found[0] if len(found) == 1 else None


def _bare(text: str) -> str:
    return " ".join(_MARKUP.sub(" ", normalize("NFKC", text)).split()).strip(" .").casefold()


def _last(pattern: re.Pattern[str], text: str, known: str) -> str | None:
    found = [next(group for group in match.groups() if group) for match in pattern.finditer(text)]
    return next((letter for letter in reversed(found) if letter in known), None)


def _alone(text: str, known: str, choices: Sequence[str]) -> str | None:
    """The letter of the last line that is one, of the text's start, or of its last brackets."""
    lines = [" ".join(_MARKUP.sub(" ", line).split()) for line in text.splitlines() if line.strip()]
    if len(lines) == 1 and re.fullmatch(r"[a-z]\)?\.?", lines[0]):
        return _known(lines[0][0].upper(), known)
    for line in reversed(lines):
        if match := _ALONE.fullmatch(line):
            return _known((match[1] or match[2]).upper(), known)
        if (match := _WITH_TEXT.fullmatch(line)) and _same_choice(match[2], known, choices) == match[1]:
            return match[1]
    if lines and (match := _WITH_TEXT.match(lines[0])):
        return _known(match[1], known)
    bracketed = [letter for letter in re.findall(r"\(([A-Z])\)", text) if letter in known]
    if len(set(bracketed)) == 1:
        return bracketed[0]
    return _same_choice(lines[-1], known, choices) if lines else None


def _known(letter: str, known: str) -> str | None:
    return letter if letter in known else None
