"""Run a program that a model wrote, in a process that can compute and nothing else.

The program may not write files, start processes or threads, open sockets or signal others, and has bounded
time, memory and output: `_jail.py` says how. Linux on x86_64 and aarch64; refused elsewhere. Knows no tasks.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2t.errors import ConfigError

ALLOW = "S2T_ALLOW_CODE_EXECUTION"
LAYERS = ("namespaces", "uid", "landlock")
_JAIL = Path(__file__).with_name("_jail.py")
_MAX_REPLY = 16_384
_MAX_ERROR = 1000
_VERDICTS = ("passed", "failed")
_ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: `passed` to its end, `failed` with an exception, `timeout`, or `died` without a word."""

    status: str
    error: str = ""
    layers: tuple[str, ...] = ()
    """What confined it: `seccomp` and `limits` always, `namespaces`, `uid` and `landlock` where the system has them."""

    @property
    def is_passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.status == "passed"


def check_allowed() -> None:
    """Raise ConfigError unless the environment allows to run programs that a model wrote."""
    if os.environ.get(ALLOW) != "1":
        raise ConfigError(
            f"this task runs code that a model wrote, in a sandbox (docs/tasks.md); to allow it, set {ALLOW}=1."
        )


def run_program(
    program: str,
    timeout_s: float = 10.0,
    memory_bytes: int = 1 << 30,
    layers: tuple[str, ...] = LAYERS,
    answer: str = "",
) -> Outcome:
    """Run Python source to its end in a confined process of its own; its output is dropped.

    `answer` is run before it in the same namespace, but as an imported module is: its `__name__` is not "__main__".

    `timeout_s` bounds CPU seconds and wall-clock seconds alike, `memory_bytes` the address space. `layers` are the
    second walls to use where the system has them. ConfigError when running is not allowed or cannot be confined.
    """
    check_allowed()
    limits = {"AS": memory_bytes, "CPU": int(timeout_s) + 1, "FSIZE": 0, "NPROC": 1, "NOFILE": 64, "CORE": 0}
    parts = [("answer", answer), ("__main__", program)]
    job = {"parts": parts, "limits": limits, "layers": layers, "nonce": secrets.token_hex(16)}
    reply = _ask(json.dumps(job).encode("utf-8", "surrogatepass"), timeout_s)
    if reply is None:
        return Outcome("timeout", f"no end within {timeout_s:g} s")
    outcome = _read(reply, str(job["nonce"]))
    if outcome.status == "unavailable":
        raise ConfigError(f"code cannot be run safely here: {outcome.error}; use Linux on x86_64 or aarch64.")
    return outcome


def _ask(job: bytes, timeout_s: float) -> bytes | None:
    """What the jail writes until it ends, at most `_MAX_REPLY` bytes; None when time runs out."""
    if os.name != "posix":
        raise ConfigError("code cannot be run safely here: no process limits; use Linux on x86_64 or aarch64.")
    process = subprocess.Popen(
        [sys.executable, "-s", "-P", str(_JAIL)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=_ENVIRONMENT,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(job)
        process.stdin.close()
        return _read_until(process.stdout.fileno(), time.monotonic() + timeout_s)
    except BrokenPipeError:
        return b""
    finally:
        _end(process)


def _read_until(descriptor: int, deadline: float) -> bytes | None:
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while len(found) < _MAX_REPLY:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            part = os.read(descriptor, _MAX_REPLY)
            if not part:
                break
            found += part
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole session, whatever is left of it, and let go of its pipes."""
    with suppress(ProcessLookupError):  # it ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # what was not written has no reader
                stream.close()


def _read(reply: bytes, nonce: str) -> Outcome:
    """The outcome that a reply states: a line from before the program ran, and one from after it.

    The program may have written what it likes behind the first line: only its own verdict can suffer.
    """
    first, _, second = reply.partition(b"\n")
    ready = _line(first, nonce)
    if ready.get("status") == "unavailable":
        return Outcome("unavailable", str(ready.get("error", "")))
    verdict = _line(second.removesuffix(b"\n"), nonce)
    if ready.get("status") != "ready" or verdict.get("status") not in _VERDICTS:
        return Outcome("died", "the process ended before the program did")
    return Outcome(verdict["status"], str(verdict.get("error", ""))[:_MAX_ERROR], tuple(ready["layers"]))


def _line(text: bytes, nonce: str) -> dict[str, Any]:
    """The object that a line holds with the job's nonce; empty for anything else, were it one byte more."""
    try:
        values = json.loads(text)
        is_whole = isinstance(values, dict) and json.dumps(values).encode() == text
    except (ValueError, RecursionError):
        return {}
    return values if is_whole and values.get("nonce") == nonce else {}
