r"""Where a text states its answer: behind `####`, in a box or a tag, after "answer is", else at its end.

Only the place is looked for, outside all thinking; a formula that begins with the number looked for is given back
whole. Knows no gold answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

from s2t.tasks.number_words import words_value
from s2t.tasks.numerals import is_unit, read_number, scales_in, with_long_scales
from s2t.tasks.thinking import without_thinking
from s2t.tasks.writing import MAX_TIDIED, bare, tidy

_PHRASE = re.compile(r"\banswer\s*\**\s*(?:is|:|=)\s*:?(?!\s*not\b)", re.IGNORECASE)
_BOX = re.compile(r"\\f?boxe?d?\s*\{")
_BETWEEN_BOXES = re.compile(r"[\s$\\,;().]*(?:\\text\s*\{)?\s*(?:and|or|,|;)\s*(?:\}|[A-Za-z]\s*=|[\s$\\,;()])*")
_COPULA = re.compile(
    r"\b(?:is|are|equals?|be|was|were|get|obtain|gives|have|has|makes|totals?)\b\s*:?|:\s|=", re.IGNORECASE
)
_MATH = re.compile(r"\$+[^$]+\$+|\\\(.+?\\\)|\\\[.+?\\\]")
_JOINS = re.compile(r"[\s,;]*(?:and|or)?[\s,;]*")
_PROSE = re.compile(
    r"(?<=[A-Za-z\s])\\ldots(?![A-Za-z])|\\text\s*\{[^{}]*\}|(?<![A-Za-z\\{_])[A-Za-z]{2,}(?:'[a-z]+)?|(?<![^\s,])[A-Za-z]\s+(?=[0-9])|[,;?](?=\s|$)|(?<!\s):(?=\s|$)|\\Rightarrow(?![A-Za-z])|(?<!\S)\([a-h]\)(?=\s)|\.(?=\s|$)"
    r"|(?<=[\w)}%])\s+\((?=\s*[A-Za-z]{2})|(?<=[\w)}%])\s+\((?=[^()]*[A-Za-z]{3}[^()]*\))|#+\s|\s\|\s"
)
_SENTENCE_END = re.compile(r"(?<=[^\s.])[.?](?=\s|$)|\n|(?<=\s)[—](?=\s)")
_DIGIT = re.compile(r"[0-9½⅓⅔¼¾⅛-⅞⁰-⁹𝟎-𝟿]")
_LIST = re.compile(r"\s*(?:,|;|and|or|,\s*and|,\s*or)\s*|\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}\s*")
_MORE = re.compile(
    r"\s*(?:squared|cubed|factorial|(?:and\s+)?(?:a|one)\s+(?:half|third|quarter)|and\s+\\frac|plus|minus|times|divided|or\s+more|to\s+[0-9]+)\b"
)
_COMPOUND = re.compile(r"\s*[A-Za-z]+,?\s+and\s*")
_HEDGED = re.compile(
    r"\b(?:not|no|than|least|most|under|between|or|and|half|squared|cubed|factorial|except|never|cannot)\b", re.I
)
_EXCLAIMED = re.compile(r"(?<=[\w)}%])!(?=\s*$|\s+[A-Z])")  # the end of a sentence, and no factorial
_HEDGE = re.compile(
    r"\b(?:not|isn't|cannot be|can't be|never|at least|at most|(?:more|less|fewer|greater|smaller|larger|other) than)\s*$",
    re.I,
)
_RANGE = re.compile(r"[0-9][0-9.,]*(?:-[0-9][0-9.,]*)+")
_WHOLE_HOUR = re.compile(r"([0-9]{1,2}):00")
_NAME = re.compile(r"\s*[A-Za-z]\s*")
_MAX_BOXED_LINE = 2000
_HEADING = re.compile(
    r"\W*(?:(?:(?:the|my|our)\s+)?(?:final\s+)?(?:answer|conclusion|result|solution|summary|explanation|verification|reasoning|calculation)s?\W*"
    r"|(?:step|day|week|month|year|hour|part|case|question|problem|example|method|section|phase|stage|round)\s+#?[0-9]+\b.*)",
    re.IGNORECASE,
)
_CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")  # GSM8K's own marks


@dataclass(frozen=True)
class _Run:
    """A stretch of mathematics in a sentence, with what stands before and behind it."""

    text: str
    start: int
    end: int
    before: str
    after: str


def extract_answer(text: str, gold_is_number: bool) -> str | None:
    r"""The final answer stated in a text; None when there is none.

    Looked for in this order: after the last `####`, in the last `\boxed{}`, in the last `<answer>` tag, after
    "answer is"; else the last number (number golds) or the last line that is not empty. A box that follows
    the last `####` wins over it, since `####` then opened a heading. Thinking is no part of the text.
    """
    text = _CALCULATOR.sub("", without_thinking(text))
    segments = [segment.strip() for segment in marked_segments(text) if segment.strip()]
    phrases = list(_PHRASE.finditer(text))
    phrase = re.sub(r"^[*_]+(?=\s)", "", text[phrases[-1].end() :].strip()).strip() if phrases else ""
    if gold_is_number:
        return _extract_number(text, segments, phrase)
    if segments:
        return segments[0]
    lines = [line.strip() for line in (phrase or text).splitlines() if line.strip()]
    if not lines:
        return None
    return _statement(lines[0], is_first=True).rstrip(". ") if phrase else _statement(lines[-1], is_first=False)


def marked_segments(text: str) -> list[str]:
    """What the `####`, boxed and tag markers enclose, the most trusted first; a heading over further lines encloses nothing."""
    boxed, tags = _last_boxed(text), _last_tagged(text)
    _, mark, tail = text.rpartition("####")
    first, *more = [line for line in tail.splitlines() if line.strip()] or [""]
    hashed = [tail] if mark and not (more and _HEADING.fullmatch(first)) else []
    box = [boxed] if boxed is not None else []
    ordered = [*box, *hashed] if _last_boxed(tail) is not None else [*hashed, *box]
    return [*ordered, *tags]


def boxed_together(text: str) -> str | None:
    r"""The boxes of the last line that has some, as one list: "\boxed{8} and \boxed{2}" is "8, 2"."""
    text = without_thinking(text)
    lines = [line for line in text.splitlines() if "\\boxed{" in line and len(line) <= _MAX_BOXED_LINE]
    found = [content for _, _, content in _boxes(lines[-1])] if lines else []
    return ", ".join(found) if len(found) > 1 else None


def _last_tagged(text: str) -> list[str]:
    """The content of the last closed `<answer>` tag, or nothing."""
    lowered = text.lower() if "nswer>" in text.lower() else text
    end = lowered.rfind("</answer>")
    begin = lowered.rfind("<answer>", 0, end) if end >= 0 else -1
    return [text[begin + len("<answer>") : end]] if begin >= 0 and len(lowered) == len(text) else []


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` with its braces balanced, or of the last few that one list is."""
    last = _last_opened(text)
    if last is None:
        return None
    line = text.rfind("\n", 0, last.start()) + 1
    boxes = _boxes(text[max(line, last.start() - _MAX_BOXED_LINE) :])
    if not boxes or _closed(text, last.end()) is None:
        return None
    kept = [boxes[-1]]
    offset = max(line, last.start() - _MAX_BOXED_LINE)
    for box in reversed(boxes[:-1]):
        if _BETWEEN_BOXES.fullmatch(text[offset + box[1] : offset + kept[0][0]][:200]) is None:
            break
        kept.insert(0, box)
    contents = [content for _, _, content in kept]
    return contents[0] if len(set(contents)) == 1 else ", ".join(contents)


def _last_opened(text: str) -> re.Match[str] | None:
    """The last opened box, found from the end; of many commands without braces few are looked at."""
    place = len(text)
    for _ in range(100):
        place = max(text.rfind("\\boxed", 0, place), text.rfind("\\fbox", 0, place))
        if place < 0:
            break
        if match := _BOX.match(text, place):
            return match
    return None


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of the boxes that stand in no other box."""
    found, place = [], 0
    while (match := _BOX.search(text, place)) and len(found) < 100:
        end = _closed(text, match.end())
        if end is None:
            place = match.end()
            continue
        found.append((match.start(), end + 1, text[match.end() : end]))
        place = end + 1
    return found


def _closed(text: str, begin: int) -> int | None:
    depth = 1
    for index in range(begin, min(len(text), begin + 20_000)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return None


def _extract_number(text: str, segments: list[str], phrase: str) -> str | None:
    for segment in segments:
        if (number := _stated(segment)) is not None:
            return number
        if not re.search(r"[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", segment.splitlines()[0])):
            break  # a formula, or a list: not a heading
    if segments and (not phrase or _boxed_first(text, segments)):
        return segments[0]
    if phrase and (found := _from_phrase(phrase)) is not None:
        return found
    if segments:
        return segments[0]
    lines = [line for line in text[-20 * MAX_TIDIED :].splitlines() if _DIGIT.search(line)]
    if not lines:
        return None
    runs = _runs(lines[-1][-MAX_TIDIED:])
    return _number_of(runs[-1], is_last=True) if runs else None


def _boxed_first(text: str, segments: list[str]) -> bool:
    boxed = _last_boxed(text)
    return boxed is not None and boxed.strip() == segments[0]


def _from_phrase(phrase: str) -> str | None:
    """The number that the first line behind "the answer is" states, whole: a list or a compound of units is no number."""
    sentence = _SENTENCE_END.split(phrase[:MAX_TIDIED], maxsplit=1)[0]
    runs = _runs(sentence)
    if not runs:
        found = re.findall(r"[A-Za-z-]+", sentence)
        return next(
            (str(value) for end in (6, 4, 3, 2, 1) if (value := words_value(" ".join(found[:end]))) is not None), None
        )
    first, tidied = runs[0], runs[0].before + runs[0].text + runs[0].after
    if len(runs) > 1:
        between = [tidied[one.end : other.start] for one, other in pairwise(runs)]
        rest = tidied[runs[-1].end :].strip(" .")
        if _COMPOUND.fullmatch(between[0]) or (all(_LIST.fullmatch(gap) for gap in between) and len(rest.split()) < 2):
            return tidied[first.start :].strip(" .")
    return _number_of(first, is_last=False)


def _stated(segment: str) -> str | None:
    """The number that a marked segment states: alone, beside an equals sign, or as the one number of a sentence."""
    lines = segment.strip().splitlines()
    whole = " ".join(lines) if len(segment) < 400 else lines[0]
    for part in dict.fromkeys((lines[0], whole) if len(lines) > 1 and not _is_formula(lines[1]) else (whole,)):
        if (number := _plain_number(part)) is not None:
            return number
    sentence = _SENTENCE_END.split(segment.strip()[:MAX_TIDIED], maxsplit=1)[0]
    runs = _runs(sentence)
    if not runs and (said := list(_COPULA.finditer(sentence))):
        return read_number(sentence[said[-1].end() :])
    if not runs or not re.search(r"[A-Za-z]{2}", re.sub(r"\\(?!text)[A-Za-z]+", "", sentence)):
        return None
    is_heading = re.match(r"(?:step\s*)?[0-9]+\s*[.:)]", sentence, re.IGNORECASE)
    if len(runs) != 1 or _HEDGED.search(sentence) or (is_heading and not _COPULA.search(runs[0].before)):
        return None
    if not is_unit(runs[0].after) and not scales_in(runs[0].after):
        return None
    number = _number_of(runs[0], is_last=False)
    return number if number is not None and read_number(number) is not None else None


def _is_formula(line: str) -> bool:
    return bool(line.strip()) and re.search(r"[A-Za-z]{2}", re.sub(r"\\[A-Za-z]+", "", line)) is None


def _plain_number(text: str) -> str | None:
    """The number that a text is, alone or at the end of a chain of equal sides."""
    if (number := read_number(text)) is not None:
        return number
    sides = re.split(r"=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])", bare(tidy(text)))
    if len(sides) == 1:
        return None
    side = sides[-2] if _NAME.fullmatch(sides[-1]) else sides[-1]
    return read_number(re.sub(r"\\text\s*\{\s*\}", "", side))


def _runs(line: str) -> list[_Run]:
    """The stretches of a line that have a digit and no prose."""
    plain = tidy(with_long_scales(_EXCLAIMED.sub("", line)))
    edges = [(0, 0), *((match.start(), match.end()) for match in _PROSE.finditer(plain)), (len(plain), len(plain))]
    found = []
    for (_, start), (end, _) in pairwise(edges):
        if start < end and _DIGIT.search(plain, start, end):
            found.append(_Run(plain[start:end], start, end, plain[:start], plain[end:]))
    return found


def _number_of(run: _Run, is_last: bool) -> str:
    """The number that a run states, with a scale behind it; else the run itself, which is then no number."""
    text = _trimmed(run.text)
    text = re.sub(r"^(?:-|\*)\s+", "", text) if run.before.strip() else text
    if match := _WHOLE_HOUR.fullmatch(text):
        return match[1]
    if _RANGE.fullmatch(text) and is_last:
        return text.rpartition("-")[2]
    if _MORE.match(run.after):
        return bare(f"{text} {run.after}")
    if hedge := _HEDGE.search(run.before):
        return bare(f"{hedge[0]} {text}")
    if re.search(r"\b(?:minus|negative)\s*\}?\s*$", run.before, re.IGNORECASE):
        text = f"-{text}"
    scales = scales_in(run.after)
    if scales and _plain_number(text) is not None:
        text = f"{text} {scales}"
    return _plain_number(text) or text


def _trimmed(text: str) -> str:
    """The run without punctuation and brackets that belong to the sentence."""
    text = re.sub(r"\s+-$", "", bare(text).strip("\"' "))
    for opening, closing in ("()", "{}", "[]"):
        if text.count(opening) != text.count(closing):
            text = (
                text.removesuffix(closing) if text.count(closing) > text.count(opening) else text.removeprefix(opening)
            )
            text = text.strip().removesuffix(opening).strip()
    return bare(text)


def _statement(line: str, is_first: bool) -> str:
    r"""The part of a line that states a value: its mathematics ("so it is $2\sqrt{2}$."), else what follows "is"."""
    spans = list(_MATH.finditer(line[:MAX_TIDIED]))
    outside = _MATH.sub(" ", line[:MAX_TIDIED])
    if spans and re.search("[A-Za-z]{2}", outside):
        groups = [[spans[0]]]
        for span in spans[1:]:
            if _JOINS.fullmatch(line[groups[-1][-1].end() : span.start()]):
                groups[-1].append(span)
            else:
                groups.append([span])
        group = groups[0] if is_first else groups[-1]
        return line[group[0].start() : group[-1].end()]
    if spans or is_first:
        return line
    said = list(re.finditer(r"\b(?:is|are|equals|be)\b:?", line, re.IGNORECASE))
    rest = line[said[-1].end() :].strip(" .") if said else ""
    return rest or line
