"""Time and memory of decoding over its length, greedy beside s2t-local: writes a picture, ends with one line of JSON.

`python benchmarks/growth.py docs/images/growth.png`. One sequence of each strategy in turns, 2 % triggers; memory is what
the cache has allocated, since that is all that grows.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import matplotlib
import torch

from s2t.bench.decode import DecodeBench, exact_keys
from s2t.bench.timing import machine
from s2t.config import BenchConfig
from s2t.decode.loop import Decoder
from s2t.methods.select import S2TLocal
from s2t.methods.strategies import Strategy
from s2t.methods.triggers import Never, Random
from s2t.model.engine import Engine
from s2t.records import Request

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LENGTHS = (256, 512, 1024, 2048, 3072, 4096)
RATE = 0.02
SLM = "tiny:slm-unfiltered"


def main() -> None:
    bench = DecodeBench(BenchConfig(slm=SLM, batch_size=1, prompt_tokens=16))
    [prompt] = bench.prompts.tolist()
    [key] = exact_keys(RATE, 1, LENGTHS[-1], 3, 0)
    engines = {"greedy": Engine(bench.base, 1), "s2t-local": Engine(bench.adapter.loaded, 1, bench.adapter)}
    strategies = {
        "greedy": Strategy("greedy", Never()),
        "s2t-local": Strategy("s2t-local", Random(), RATE, S2TLocal()),
    }
    runs = {
        name: Decoder(engine, strategies[name], None, LENGTHS[-1]).run([Request(0, prompt, key)])
        for name, engine in engines.items()
    }
    spent = dict.fromkeys(runs, 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    megabytes: dict[str, list[float]] = {name: [] for name in runs}
    for count in range(1, LENGTHS[-1] + 1):
        for name, steps in runs.items():
            start = time.perf_counter()
            next(steps)
            spent[name] += time.perf_counter() - start
            if count in LENGTHS:
                seconds[name].append(spent[name])
                megabytes[name].append(engines[name].cache_bytes / 2**20)
        if count in LENGTHS:
            print(count, spent, file=sys.stderr, flush=True)
    _draw(Path(sys.argv[1]), seconds, megabytes)
    print(json.dumps({"tokens": LENGTHS, "seconds": seconds, "cache_mib": megabytes} | machine(torch.device("cpu"))))


def _draw(path: Path, seconds: dict[str, list[float]], megabytes: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, marker in (("greedy", "o"), ("s2t-local", "x")):
        axes[0].plot(LENGTHS, seconds[name], marker=marker, label=name)
        axes[1].plot(LENGTHS, megabytes[name], marker=marker, label=name)
    axes[0].set(xlabel="tokens", ylabel="seconds", title="Time", ylim=0)
    axes[1].set(xlabel="tokens", ylabel="cache, MiB", title="Memory that grows", ylim=0)
    for axis in axes:
        axis.set_xticks(LENGTHS)
        axis.tick_params(axis="x", labelrotation=45)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
