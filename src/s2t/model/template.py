"""Chat templates: what they are told, how they want messages given, and the text they write, within bounded time and memory.

Templates run in a process of their own (`_render.py`), one per process of ours. How a template wants messages is found out
with texts of our own and remembered, so it never depends on what a user wrote. Knows no token.
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

from s2t.errors import ModelError

SECONDS = 5.0
"""Processor time of one rendering."""
_WALL_S = 60.0  # where the machine is busy with other work, or has no timer of processor time
_MEMORY_BYTES = 1 << 30
_MIN_CHARS, _CHARS_PER_CHAR = 1 << 20, 8  # the longest output: a megabyte, or eight times what went in
_SIGPROF = getattr(signal, "SIGPROF", 0)
_PROBE = "7391{:05d}4826"  # digits alone, which no template changes
Turns = Sequence[dict[str, Any]]


class TemplateRefused(ModelError):
    """A template's own refusal of messages, or a slip in it that other messages may not meet."""


def render(tokenizer: Any, turns: Turns, **options: Any) -> str:
    """Messages as the tokenizer's chat template writes them, whatever form it wants them in; `options` are its variables.

    A template that takes no system message gets it before the first user message, one that takes content as a list of parts
    gets parts. Raises ModelError, one line, for messages that the template refuses or leaves out, and for a template that
    fails, or needs too much time, memory or room.
    """
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return _written_by(tokenizer, turns, options)
    template = _Template.of(tokenizer, options)
    form = _form(template, tuple(turn["role"] for turn in turns))
    return template.render(form.applied(turns))


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

    @classmethod
    def of(cls, tokenizer: Any, options: dict[str, Any]) -> _Template:
        variables = {**tokenizer.special_tokens_map, **options}
        try:
            source = tokenizer.get_chat_template(None, None)
        except ValueError as error:
            raise ModelError(
                f"the chat template of this model cannot be chosen: {' '.join(str(error).split())}"
            ) from error
        return cls(str(source), json.dumps(variables, default=str, sort_keys=True))

    def render(self, turns: Turns) -> str:
        size = sum(len(str(turn["content"])) for turn in turns) + 256 * len(turns)
        options = {**json.loads(self.variables), "conversations": [list(turns)], "chat_template": self.source}
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
    """How a template wants messages of some roles: content as parts, the system message in the first user message."""

    as_parts: bool
    is_folded: bool

    def applied(self, turns: Turns) -> list[dict[str, Any]]:
        found = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
        if self.is_folded:
            joined = "\n\n".join(filter(None, (turns[0]["content"], turns[1]["content"])))
            found = [{**turns[1], "content": joined}, *found[2:]]
        if self.as_parts:
            found = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in found]
        return found


@lru_cache(512)
def _form(template: _Template, roles: tuple[str, ...]) -> _Form:
    """The first form in which every system and user message reaches the text; raises ModelError where there is none."""
    probes = [{"role": role, "content": _PROBE.format(i)} for i, role in enumerate(roles)]
    wanted = [probe["content"] for probe in probes if probe["role"] != "assistant"]
    can_fold = roles[:2] == ("system", "user")
    refusal: ModelError | None = None
    missing: list[str] = []
    for form in [_Form(parts, folds) for folds in (False, True)[: 1 + can_fold] for parts in (False, True)]:
        try:
            text = template.render(form.applied(probes))
        except TemplateRefused as error:
            refusal = refusal or error
            continue
        left_out = [probe["role"] for probe in probes if probe["content"] in wanted and probe["content"] not in text]
        if not left_out:
            return form
        missing = missing or left_out
    if refusal is not None and not missing:
        raise refusal
    raise ModelError(
        f"the chat template of this model leaves out the text of the {missing[0]} message, given the roles {_shown(roles)}."
    )


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
        return self._read(process)

    def forget(self) -> None:
        """In a fork: the process and its pipes belong to somebody else."""
        self._lock = threading.Lock()
        self._kept += [self._process] if self._process is not None else []
        self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = self._start()
            if self._read(self._process) is None:
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

    def _read(self, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
        """The next reply; None where the process ended instead, by itself or by the clock."""
        assert process.stdout is not None
        clock = threading.Timer(_WALL_S, process.kill)
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
