"""The inside of the judge: a script that compares answers, one job a line, for `judge.py`.

A model's text can make exact arithmetic run for ever; here it costs one process, which the kernel ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from typing import Any

import _compare  # pyright: ignore[reportMissingImports]  (scripts beside this one)
import _jail  # pyright: ignore[reportMissingImports]

CPU_S = 3.0  # of one job
_MEMORY_BYTES = 4 << 30


def _equal(job: dict[str, Any]) -> bool:
    left, right = (_compare.read(job[side]) for side in ("gold", "answer"))
    return _compare.is_equal(left, right, job.get("is_rounded", False))


def _proportion(job: dict[str, Any]) -> int:
    first, second = (tuple(_compare.read(side) for side in job[name]) for name in ("first", "second"))
    return _compare.proportion(first, second)


def _parses(job: dict[str, Any]) -> bool:
    return _compare.read(job["text"]) is not None


def _score(job: dict[str, Any]) -> float:
    dataset = _dataset(job["name"], json.dumps(job["settings"]))
    return float(dataset.score_answer(job["answer"], job["entry"]))


@cache
def _dataset(name: str, settings: str) -> Any:
    import reasoning_gym  # noqa: F401  (fills the registry)
    from reasoning_gym.factory import DATASETS

    factory, config_class = DATASETS[name]
    values = json.loads(settings)
    if name == "composite":
        from reasoning_gym.composite import DatasetSpec

        values["datasets"] = [DatasetSpec(part, 1.0, {}) for part in values["datasets"].split("+")]
    return factory(config=config_class(**values, seed=0, size=1))


JOBS = {"equal": _equal, "proportion": _proportion, "parses": _parses, "score": _score}


def _limit_cpu(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, whatever it is doing


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    _limit_cpu(CPU_S)
    try:
        return {"value": JOBS[job["kind"]](job)}
    except _compare.Unreadable:
        return {"value": False}
    except BaseException as error:  # the text is a model's: whatever breaks the library is a wrong answer
        return {"error": type(error).__name__}
    finally:
        _limit_cpu(0)


def _warm_up(library: str) -> None:
    if library == "math_verify":
        _equal({"gold": "\\int_0^1 x dx", "answer": "\\frac{1}{2}"})  # loads the library that integrals need
    else:
        __import__(library)


def _main() -> None:
    first = json.loads(sys.stdin.readline())
    sys.path[:] = first["path"]  # without this folder, whose names are not meant for others
    sys.dont_write_bytecode = True
    replies, errors = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.open(os.devnull, os.O_RDWR)
    os.dup2(errors, 1)
    _warm_up(first["library"])
    os.dup2(errors, 2)  # only now: why a library cannot be imported is for the user to read
    with suppress(OSError, AttributeError):  # not a Linux that can: the parent still bounds the time
        _jail.confine({"AS": _MEMORY_BYTES, "CORE": 0}, layers=(), is_tied=False)
    print(json.dumps({"value": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _main()
