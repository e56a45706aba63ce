"""The process that renders chat templates: a template is code of whoever made the model, and may loop or grow without end.

Started by `template.py`, never imported by it. One request a line, one reply a line, both JSON. What a template needs beyond
its seconds of processor time or its memory ends this process, and nothing else.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

try:
    import resource
except ImportError:  # not a Unix: the reader's own clock is the limit
    resource = None


def main() -> None:
    """Answer requests until there are no more; the first line says that the process is ready."""
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        try:
            [text], _ = render_jinja_template(**job["options"])
        except MemoryError:
            return {"over": f"{job['memory_bytes'] >> 20} MiB of memory"}
        except Exception as error:  # whatever a template can raise
            kind = (
                "refused" if type(error) is TemplateError else "failed"
            )  # that class itself: the template's own words
            return {kind: _line(error, kind)}
        if len(text) > job["max_chars"]:
            return {"over": f"{job['max_chars']} characters of output"}
        return {"text": text}

    held = _held_bytes()
    _say({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        _limit(job["seconds"], held + job["memory_bytes"])
        reply = answer(job)
        _limit(0, held + job["memory_bytes"])
        _say(reply)


def _limit(seconds: float, memory_bytes: int) -> None:
    """Let the system end this process after so many seconds of processor time (0: never), even inside one long operation."""
    if resource is not None:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _held_bytes() -> int:
    """The address space that Python and its libraries take up before the first template."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * (resource.getpagesize() if resource else 4096)
    except OSError:  # no Linux
        return 1 << 32


def _line(error: Exception, kind: str) -> str:
    text = " ".join(str(error).split())[:200]
    return text if kind == "refused" else f"{type(error).__name__}: {text}" if text else type(error).__name__


def _say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
