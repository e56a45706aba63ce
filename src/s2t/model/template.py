"""Chat templates: what they are told, how they want messages given, and the text they write, within bounded time and memory.

Templates run in a process of their own (`_render.py`), one per process of ours; only that of the embedded models, which is the
package's own, does not. How a template wants messages is found out with texts of our own and remembered, so it never depends on
what a user wrote. Knows no token.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from s2t.errors import ModelError
from s2t.model.tiny import embedded_template

SECONDS = 5.0
"""Processor time of one rendering."""
_START_S = 600.0  # transformers is imported, which a busy machine can make slow
_WALL_S = 60.0  # where the machine is busy with other work, or has no timer of processor time
_MEMORY_BYTES = 1 << 29
_MIN_CHARS, _CHARS_PER_CHAR = 1 << 20, 8  # the longest output: a megabyte, or eight times what went in
_SIGPROF = getattr(signal, "SIGPROF", 0)
_KEPT_CHARS = 4096  # of a template's variables, with which its form is kept
_PROBE = "7391{:05d}4826"  # digits alone, which no template changes
Turns = Sequence[dict[str, Any]]


class TemplateRefused(ModelError):
    """A template's own refusal of messages, or a slip in it that other messages may not meet."""


def render(tokenizer: Any, turns: Turns, **options: Any) -> str:
    """Messages as the tokenizer's chat template writes them, whatever form it wants them in, with the start of an answer.

    `options` are its variables. A template that takes no system message gets it before the first user message, one that takes
    content as a list of parts gets parts. Raises ModelError, one line, for messages that the template refuses or leaves out, and
    for a template that fails, or needs too much time, memory or room.
    """
    options = {"add_generation_prompt": True, **options}
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _written_by(tokenizer, turns, options)
    try:
        source = str(tokenizer.get_chat_template(None, None))
    except ValueError as error:
        raise ModelError(f"the chat template of this model cannot be chosen: {' '.join(str(error).split())}") from error
    variables = json.dumps({**tokenizer.special_tokens_map, **options}, default=str, sort_keys=True)
    form_of = (
        _form if len(variables) <= _KEPT_CHARS else _form.__wrapped__
    )  # a longer one is not kept: it would fill the memory
    template = _Template(source, variables)
    return template.render(form_of(template, tuple(turn["role"] for turn in turns)).applied(turns))


def _written_by(tokenizer: Any, turns: Turns, options: dict[str, Any]) -> str:
    """What a tokenizer with code of its own makes of messages."""
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, **options))
    except Exception as error:  # whatever that code can raise
        text = _sentence(" ".join(str(error).split())[:200])
        raise ModelError(f"{type(tokenizer).__name__} does not write these messages: {text}") from error


@dataclass(frozen=True, slots=True)
class _Template:
    """A template with its variables, and which of the renderer's options are set."""

    source: str
    variables: str  # JSON

    def render(self, turns: Turns) -> str:
        options = {**json.loads(self.variables), "conversations": [list(turns)], "chat_template": self.source}
        if (
            self.source == embedded_template()
        ):  # the package's own code: a process of its own would take half a second to start
            [text], _ = render_jinja_template(**options)
            return text
        size = sum(len(str(turn["content"])) for turn in turns) + 256 * len(turns)
        job = {
            "options": options,
            "seconds": SECONDS,
            "memory_bytes": _MEMORY_BYTES + 16 * size,
            "max_chars": max(_MIN_CHARS, _CHARS_PER_CHAR * size),
        }
        reply = _RENDERER.ask(job)
        if "text" in reply:
            return str(reply["text"])
        roles = _shown(turn["role"] for turn in turns)
        if "refused" in reply:
            raise TemplateRefused(
                f"the chat template of this model refuses the roles {roles}: {_sentence(reply['refused'])}"
            )
        if "failed" in reply:
            raise TemplateRefused(
                f"the chat template of this model fails on the roles {roles}: {_sentence(reply['failed'])}"
            )
        raise ModelError(
            f"the chat template of this model was given up: it needs more than {reply['over']} for the roles {roles}; "
            "mend the template, or pass a prompt without one."
        )


@dataclass(frozen=True, slots=True)
class _Form:
    """How a template wants messages: of which roles as parts, and the system message in the first user message."""

    parts: frozenset[str]
    is_folded: bool

    def applied(self, turns: Turns) -> list[dict[str, Any]]:
        found = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        if self.is_folded:
            joined = "\n\n".join(filter(None, (turns[0]["content"], turns[1]["content"])))
            found = [{**turns[1], "content": joined}, *found[2:]]
        return [{**turn, "content": _as_parts(turn)} if turn["role"] in self.parts else turn for turn in found]


def _as_parts(turn: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": turn["content"]}]


def _forms(roles: tuple[str, ...]) -> list[_Form]:
    """What to try, in order: text, then parts for all roles, for all but the system's, for one."""
    given = frozenset(roles)
    parts = dict.fromkeys([frozenset(), given, given - {"system"}, given & {"user"}, given & {"assistant"}])
    folds = (False, True) if roles[:2] == ("system", "user") else (False,)
    return [_Form(of, is_folded) for is_folded in folds for of in parts]


@lru_cache(512)
def _form(template: _Template, roles: tuple[str, ...]) -> _Form:
    """The first form in which every message reaches the text, or every one but the assistant's, which some templates cut.

    Raises ModelError where there is none.
    """
    probes = [{"role": role, "content": _PROBE.format(i)} for i, role in enumerate(roles)]
    refusal: ModelError | None = None
    missing: list[str] = []
    usable: _Form | None = None
    for form in _forms(roles):
        applied = form.applied(probes)
        try:
            text = template.render(applied)
        except TemplateRefused as error:
            refusal = refusal or error
            continue
        if any(_is_dumped(turn["content"], text) for turn in applied):
            continue
        left_out = [turn["role"] for turn in probes if turn["content"] not in text]
        if not left_out:
            return form
        if set(left_out) == {"assistant"}:
            usable = usable or form
        missing = missing or [role for role in left_out if role != "assistant"]
    if usable is not None:
        return usable
    if refusal is not None and not missing:
        raise refusal
    raise ModelError(
        f"the chat template of this model leaves out the text of the {missing[0]} message, given the roles {_shown(roles)}."
    )


def _is_dumped(content: Any, text: str) -> bool:
    """Whether a list of parts stands in a text as a list: the template took it for text."""
    return isinstance(content, list) and (str(content) in text or json.dumps(content) in text)


class _Renderer:
    """The process that renders, started at first use and again after it had to be ended; one for each process of ours."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._kept: list[subprocess.Popen[bytes]] = []  # of the process that this one was forked from

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(job, default=str).encode() + b"\n"
        with self._lock:
            process = self._started()
            try:
                reply = self._exchange(process, line)
            except BaseException:
                self.close()
                raise
            if reply is None:
                code = process.wait()
                self.close()
                return {
                    "over": f"{SECONDS:g} s of processor time"
                    if code == -_SIGPROF
                    else "the time or the memory there is"
                }
        return reply

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not written has no reader
                    pipe.close()

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, Any] | None:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(process, _WALL_S)

    def forget(self) -> None:
        """In a fork: the process and its pipes belong to somebody else."""
        self._lock = threading.Lock()
        self._kept += [self._process] if self._process is not None else []
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
            if self._read(self._process, _START_S) is None:
                self.close()
                raise ModelError(
                    f"chat templates cannot be rendered: {sys.executable} does not start with transformers."
                )
        return self._process

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(part for part in sys.path if part)
        try:
            return subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("_render.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is ours to take
            )
        except OSError as error:
            raise ModelError(
                f"chat templates cannot be rendered: no process can be started ({error.strerror})."
            ) from error

    def _read(self, process: subprocess.Popen[bytes], wall_s: float) -> dict[str, Any] | None:
        """The next reply; None where the process ended instead, by itself or by the clock."""
        assert process.stdout is not None
        clock = threading.Timer(wall_s, process.kill)
        clock.daemon = True
        clock.start()
        try:
            line = process.stdout.readline()
        finally:
            clock.cancel()
        return json.loads(line) if line.endswith(b"\n") else None


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_RENDERER.forget)


def _shown(roles: Any) -> str:
    names = [str(role) for role in roles]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _sentence(text: Any) -> str:
    return str(text).rstrip(".") + "."
