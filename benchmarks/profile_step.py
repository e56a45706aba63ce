"""Where the time of one step goes: `python benchmarks/profile_step.py --batch-size 32`; one line of JSON at the end.

An ordinary step and one in which a row selects, on the 0.5B shape with random weights, by kind of operation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from s2t.bench.decode import DecodeBench
from s2t.bench.timing import machine
from s2t.config import BenchConfig
from s2t.model.engine import Engine

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_attention_math"),
    "cache writes": ("aten::index_put_", "aten::_index_put_impl_"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::cat"),
}
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slm", default="random:qwen2.5-0.5b")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    given = parser.parse_args()
    config = BenchConfig(slm=given.slm, batch_size=given.batch_size, prompt_tokens=given.prompt_tokens)
    bench = DecodeBench(config)
    rows = list(range(given.batch_size))
    plain, local = Engine(bench.base, given.batch_size), Engine(bench.adapter.loaded, given.batch_size, bench.adapter)
    hidden = plain.extend(rows, bench.prompts.tolist())
    local.extend(rows, bench.prompts.tolist())
    ids = plain.logits(hidden).topk(8).indices
    tokens = ids[:, :1].tolist()

    def ordinary() -> None:
        plain.logits(plain.extend(rows, tokens)).argmax(-1).tolist()

    def selecting() -> None:
        state, branch = local.step(rows, tokens, [0], bench.prompts[:1, -1:], back=1)
        local.logits(state).argmax(-1).tolist()
        bench.adapter.scores(branch, ids[:1], ids[:1] * 0.0).argmax(-1).tolist()

    result = {"ordinary step": _profile(ordinary), "step with one selection": _profile(selecting)}
    for name, parts in result.items():
        print(name, *(f"{kind} {value:.1f}" for kind, value in parts.items()), sep="; ")
    print(json.dumps({"batch_size": given.batch_size, "ms": result} | machine(torch.device("cpu"))))


def _profile(run: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one call by kind of operation; what no listed operation accounts for is `other`."""
    run()
    times = []
    for _ in range(2 * REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(REPEATS):
            run()
    own = {event.key: event.self_cpu_time_total / 1000 / REPEATS for event in found.key_averages()}
    parts = {kind: sum(own.get(name, 0.0) for name in names) for kind, names in KINDS.items()}
    total = 1000 * sorted(times)[REPEATS]
    return {"total": total} | parts | {"small operations and Python": max(0.0, total - sum(parts.values()))}


if __name__ == "__main__":
    main()
