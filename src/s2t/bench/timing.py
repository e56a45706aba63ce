"""Measuring in turns: contestants advance alternately, so that a machine's slow drift falls on all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from s2t.files import versions

Contestant = Callable[[], Iterator[object]]


def in_turns(
    contestants: Mapping[str, Contestant],
    device: torch.device,
    rounds: int = 3,
    warmup_rounds: int = 1,
    chunk: int = 1,
    on_round: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds that each contestant took in each round, A B A B ..., every turn being `chunk` items of its iterator.

    An iterator that yields once is timed whole. Warm-up rounds are run and not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(warmup_rounds + rounds):
        spent = _one_round(contestants, device, chunk)
        if number >= warmup_rounds:
            for name, value in spent.items():
                seconds[name].append(value)
        if on_round is not None:
            on_round()
    return seconds


def _one_round(contestants: Mapping[str, Contestant], device: torch.device, chunk: int) -> dict[str, float]:
    running = {name: start() for name, start in contestants.items()}
    spent = dict.fromkeys(running, 0.0)
    while running:
        for name, items in list(running.items()):
            begin = time.perf_counter()
            is_over = sum(1 for _ in zip(range(chunk), items, strict=False)) < chunk
            _synchronize(device)
            spent[name] += time.perf_counter() - begin
            if is_over:
                del running[name]
    return spent


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(seconds: Mapping[str, list[float]], of: str, to: str) -> float:
    """Median over rounds of the time of one contestant over that of another in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: of the GPU's allocator, or of this process (Linux; 0 elsewhere)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return _status("VmHWM")


def memory_bytes() -> int:
    """Memory of this process now (Linux; 0 elsewhere)."""
    return _status("VmRSS")


def _status(key: str) -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    line = next((line for line in path.read_text().splitlines() if line.startswith(key)), f"{key}: 0 kB")
    return int(line.split()[1]) * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "versions": versions()}


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")
