"""Code tasks: the function that an answer writes, put together with its tests and run in the sandbox.

Knows the shape of HumanEval's fields and no datasets.
"""

from __future__ import annotations

import re
import textwrap
import warnings

from s2t.records import Grade
from s2t.tasks.sandbox import run_program

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = {"", "python", "py", "python3"}
_INDENT = "    "
_MAX_CUTS = 100


def grade_program(prompt: str, text: str, tests: str, entry_point: str | None, timeout_s: float = 10.0) -> Grade:
    """Right when the function that the text writes passes the tests in the sandbox.

    `tests` defines `check(candidate)` when an entry point is named, else it is run as it is. The code read
    from the text is the grade's answer. ConfigError when running code is not allowed.
    """
    code = extract_code(text, entry_point)
    if code is None:
        return Grade(False, None)
    program = complete(prompt, code, entry_point)
    call = f"\n\ncheck({entry_point})\n" if entry_point else "\n"
    outcome = run_program(f"{program}\n\n{tests}{call}", timeout_s)
    return Grade(outcome.is_passed, code)


def extract_code(text: str, entry_point: str | None) -> str | None:
    """The code in a text: the last fenced block that defines the entry point, else the last one, else all of it."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in _PYTHON and body.strip()]
    defining = [body for body in blocks if _defines(body, entry_point)]
    if defining or blocks:
        return textwrap.dedent((defining or blocks)[-1]).rstrip()
    body = text.split("\n```", 1)[0].rstrip()
    return body.strip("\n") if body.strip() else None


def complete(prompt: str, code: str, entry_point: str | None) -> str:
    """A whole program of the prompt and the code, which is either the whole function or what follows the prompt."""
    if not entry_point:
        return code
    if _defines(code, entry_point):
        return _preamble(prompt, entry_point) + _without_prose(code)
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
    return bool(entry_point) and re.search(rf"^\s*(?:async\s+)?def\s+{entry_point}\b", code, re.MULTILINE) is not None


def _preamble(prompt: str, entry_point: str) -> str:
    """What the prompt has above the function: imports, and helpers that the function may use."""
    match = re.search(rf"^def\s+{entry_point}\b", prompt, re.MULTILINE)
    return prompt[: match.start()] if match else ""


def _without_prose(code: str) -> str:
    """The code from its first line of code on, up to where it stops being code; prose may stand around it."""
    lines = code.split("\n")
    if _error_line(code) is None:
        return code
    starts = [i for i, line in enumerate(lines) if re.match(r"(?:async\s+def|def|import|from|class)\b|@", line)]
    lines = lines[starts[0] if starts else 0 :]
    end = len(lines)
    for _ in range(_MAX_CUTS):
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
