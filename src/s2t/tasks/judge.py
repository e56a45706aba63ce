"""Ask a process of its own whether two answers are equal, and get an answer in bounded time.

Safe from any thread and any worker process: the caller's signals are left alone. Knows no tasks; what is
asked is in `_judge.py`.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2t.errors import missing_extra

_SCRIPT = Path(__file__).with_name("_judge.py")
_START_S = 120.0
_JOB_S = 20.0  # wall clock; the judge's own bound is CPU time, so a busy machine grades alike
_CPU_SIGNAL = getattr(signal, "SIGPROF", 0)
_PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}
_log = logging.getLogger(__name__)


class Judge:
    """One judging process with one library, started at the first question and again after one that was too hard."""

    def __init__(self, library: str) -> None:
        self._library = library
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **job: Any) -> Any:
        """The job's value; None when it broke the library, or took too long, which is logged."""
        if find_spec(self._library) is None:
            raise missing_extra(_PACKAGES[self._library], "eval")
        with self._lock:
            reply = self._ask(job)
        if reply is None:
            _log.warning("gave up on an answer that took too long to grade: %s", str(job)[:300])
        return None if reply is None else reply.get("value")

    def close(self) -> None:
        """End the process; the next question starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # what was not written has no reader
                        stream.close()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any] | None:
        for _ in range(2):  # once more where the process was ended from outside, by neither bound
            if self._process is not None and self._process.poll() is not None:
                self.close()  # it was ended between two questions
            if self._process is None:
                self._process = self._start()
            start = time.monotonic()
            reply = _exchange(self._process, job, _JOB_S)
            if reply is not None:
                return reply
            code = self._process.wait()
            self.close()
            if code == -_CPU_SIGNAL or time.monotonic() - start >= _JOB_S:
                return None
        return None

    def _start(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(_SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        first = {"path": [path for path in sys.path if path], "library": self._library}
        if _exchange(process, first, _START_S) is None:
            self._process = process
            self.close()
            raise RuntimeError(f"the judging process with {self._library} does not start")
        return process


def _exchange(process: subprocess.Popen[str], job: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """One line out, one line back; None when the process ended or had to be ended."""
    assert process.stdin is not None and process.stdout is not None
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line.endswith("\n"):
            return json.loads(line)
    except BrokenPipeError:
        pass  # it has ended
    else:
        process.kill()  # half a line: it is ending
    finally:
        timer.cancel()
    return None


_judges = {library: Judge(library) for library in _PACKAGES}
_of_parents: list[Judge] = []


def ask(library: str, **job: Any) -> Any:
    """Ask this process's judge with a library (`math_verify` or `reasoning_gym`); see `Judge.ask`."""
    return _judges[library].ask(**job)


def _forget() -> None:
    """After a fork the judges are the parent's; a child starts its own."""
    _of_parents.extend(_judges.values())
    _judges.update({library: Judge(library) for library in _PACKAGES})


def _close_all() -> None:
    for judge in _judges.values():
        judge.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_close_all)
