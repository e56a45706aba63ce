"""Code tasks: the function that an answer writes, put together with its tests and run in the sandbox.

Knows the shape of HumanEval's fields and no datasets.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from dataclasses import dataclass

from s2t.records import Grade
from s2t.tasks.sandbox import run_program
from s2t.tasks.thinking import without_thinking

_FENCE_LINE = re.compile(r"[ \t]*(?:>[ \t]?)?(`{3,}|~{3,})[ \t]*([\w+-]*)[^`\n]*")
_PYTHON = {"", "python", "py", "python3"}
_FUTURE = re.compile(r"^from __future__ import [^\n]*\n?", re.MULTILINE)
_STATEMENT = re.compile(
    r"[ \t]*(?:return|yield|raise|pass|for|while|if|try|with|assert|def|global|nonlocal)\b|[^=\n]+=(?!=)"
)
_INDENT = "    "
_MAX_CUTS = 100
_MAX_COMPILED = 4_000_000  # characters in all, while a text is searched for code
_MAX_CODE = 200_000


@dataclass(frozen=True)
class _Block:
    """A fenced block: its code, and whether its fence was closed."""

    code: str
    language: str
    is_closed: bool


def grade_program(prompt: str, text: str, tests: str, entry_point: str | None, timeout_s: float = 10.0) -> Grade:
    """Right when the function that the text writes passes the tests in the sandbox.

    `tests` defines `check(candidate)` when an entry point is named, else it is run as it is. What the answer does
    only when it is run as a script (`if __name__ == "__main__":`) is not done. The code read from the text, outside
    its thinking, is the grade's answer. ConfigError when running code is not allowed.
    """
    code = extract_code(text, entry_point)
    if code is None:
        return Grade(False, None)
    call = f"\n\ncheck({entry_point})\n" if entry_point else "\n"
    outcome = run_program(f"{tests}{call}", timeout_s, answer=complete(prompt, code, entry_point))
    return Grade(outcome.is_passed, code)


def extract_code(text: str, entry_point: str | None) -> str | None:
    """The code in a text: a fenced block that defines the entry point, else what stands before a lone closing fence,
    else the last block, else all of the text.

    Of several blocks the last is taken that is whole: closed, and Python to its end.
    """
    text = without_thinking(text)[:_MAX_CODE]
    before, blocks = _fenced(text)
    defining = [block for block in blocks if _defines(block.code, entry_point)]
    if not defining and (_defines(before, entry_point) or _is_body(before)):
        return before.strip("\n").rstrip()
    if defining or blocks:
        return _best(defining or blocks).rstrip()
    return before.strip("\n").rstrip() or None


def _fenced(text: str) -> tuple[str, list[_Block]]:
    """What stands before the first fence, and the Python blocks; a fence that names a language always opens one."""
    before, lines, mark, language, in_string = "", [], "", "", False
    blocks: list[_Block] = []
    for line in text.split("\n"):
        match = _FENCE_LINE.fullmatch(line)
        is_fence = match is not None and (not mark or (match[1].startswith(mark) and not in_string) or bool(match[2]))
        if not is_fence or match is None:
            lines.append(line)
            in_string ^= (line.count('"""') + line.count("'''")) % 2 == 1  # a docstring may hold a fence
            continue
        in_string = False
        content, lines = "\n".join(lines), []
        if mark:
            blocks.append(_Block(textwrap.dedent(content), language, is_closed=not match[2]))
        elif not blocks and not before:
            before = content
        mark, language = ("", "") if mark and not match[2] else (match[1], match[2].lower())
    rest = "\n".join(lines)
    if mark:
        rest = re.sub(rf"{mark[0]}{{3,}}\s*\Z", "", rest)  # a closing fence behind the last line of code
        blocks.append(_Block(textwrap.dedent(rest), language, is_closed=False))
    elif not blocks:
        before = rest
    return before, [block for block in blocks if block.language in _PYTHON and block.code.strip()]


def _best(blocks: list[_Block]) -> str:
    """The last block that is closed and Python to its end; else the last that is one of these; else the last."""
    ranks = [2 * _compiles_alone(block.code) + block.is_closed for block in blocks]
    return blocks[max(range(len(blocks)), key=lambda place: (ranks[place], place))].code


def _compiles_alone(code: str) -> bool:
    return _compiles(code) or _compiles("def body():\n" + textwrap.indent(code, _INDENT))


def _is_body(text: str) -> bool:
    """Whether a text is the body of a function, and no prose."""
    lines = [line for line in text.split("\n") if line.strip()]
    has_statement = any(_STATEMENT.match(line) for line in lines)
    return has_statement and (lines[0][:1].isspace() or _compiles("def body():\n" + textwrap.indent(text, _INDENT)))


def complete(prompt: str, code: str, entry_point: str | None) -> str:
    """A whole program of the prompt and the code, which is either the whole function or what follows the prompt."""
    if not entry_point:
        return _without_prose(code)
    if _defines(code, entry_point):
        return _with_future_first(_preamble(prompt, entry_point) + _without_prose(code))
    body = _body(code)
    if code[:1].isspace():
        return prompt + body
    lines = body.split("\n")
    tries = [  # a text is often stripped, and its first line or all of it has lost the indentation
        prompt + textwrap.indent(code, _INDENT),
        prompt + "\n".join([_INDENT + lines[0], *lines[1:]]),
        prompt + textwrap.indent(body, _INDENT),
    ]
    return next((program for program in tries if _compiles(program)), prompt + body)


def _defines(code: str, entry_point: str | None) -> bool:
    return bool(entry_point) and _definition(entry_point).search(code) is not None


def _definition(entry_point: str) -> re.Pattern[str]:
    name = re.escape(entry_point)
    return re.compile(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]*)?=(?!=)", re.MULTILINE)


def _preamble(prompt: str, entry_point: str) -> str:
    """What the prompt has above the function: imports, and helpers that the function may use."""
    match = _definition(entry_point).search(prompt)
    return prompt[: match.start()] if match else ""


def _with_future_first(program: str) -> str:
    """The program with its imports from the future where Python wants them."""
    return "".join(line.rstrip("\n") + "\n" for line in _FUTURE.findall(program)) + _FUTURE.sub("", program)


def _without_prose(code: str) -> str:
    """The code from its first line of code on, up to where it stops being code; prose may stand around it."""
    lines = code.split("\n")
    if _error_line(code) is None:
        return code
    starts = [i for i, line in enumerate(lines) if re.match(r"(?:async\s+def|def|import|from|class)\b|@", line)]
    lines = lines[starts[0] if starts else 0 :]
    end = len(lines)
    for _ in range(min(_MAX_CUTS, 1 + _MAX_COMPILED // (len(code) + 1))):
        line = _error_line("\n".join(lines[:end]))
        if line is None:
            return "\n".join(lines[:end])
        end = min(end, line) - 1
        if end <= 0:
            break
    return code


def _body(code: str) -> str:
    """The lines of a function's body: up to the first that stands at the margin below an indented one."""
    kept, has_indented = [], False
    for line in code.split("\n"):
        if has_indented and line[:1].strip():
            break
        kept.append(line)
        has_indented = has_indented or line.startswith((" ", "\t"))
    return "\n".join(kept)


def _compiles(code: str) -> bool:
    return _error_line(code) is None


def _error_line(code: str) -> int | None:
    """The line at which the code stops being Python; None when all of it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as unknown escapes: the model's own, not ours
            compile(code, "<answer>", "exec", dont_inherit=True)  # parsing alone lets a stray return pass
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None
