"""S2T-LOCAL beside plain greedy on one vLLM server: tokens/s, requests per token; the last line is JSON.

    s2t merge --adapter runs/train/adapter --out runs/merged      # scope always or stream, criticality reserved
    PYTHONPATH=src .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model runs/merged --dtype float32 \\
        --logits-processors s2t.integrations.vllm:SelectToThink --port 8000 ...
    python benchmarks/vllm.py --slm runs/merged --slm-url http://127.0.0.1:8000/v1

The threshold is set on calibration problems so that the wanted share of steps triggers; the ways take turns. With --random the
steps that trigger are drawn instead, for a selector that has learned nothing. vLLM's processes spin while they wait for each
other: on few cores pin them, and this script, apart (`taskset`), or they keep the client from running.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
import urllib.request
from typing import Any

import numpy as np

from s2t.api import load
from s2t.core.calibration import threshold_at
from s2t.decode.remote.wire import CompletionRequest
from s2t.tasks.problems import load_task

WARMUP_STEPS = 3


def plain(reasoner: Any, prompts: list[list[int]], max_tokens: int, in_flight: int) -> int:
    """Plain greedy, a request a problem, nothing listed and nothing biased; the number of tokens."""
    stops = {"stop_token_ids": sorted(reasoner.pair.stop_ids), "ignore_eos": True}

    async def work(client: Any) -> int:
        room = asyncio.Semaphore(in_flight)

        async def one(ids: list[int]) -> int:
            async with room:
                return len((await client.complete(CompletionRequest(ids, max_tokens, extra=stops))).token_ids)

        return sum(await asyncio.gather(*map(one, prompts)))

    return reasoner.pair.served_slm.client.run(work)


def main() -> None:
    args = _arguments()
    reasoner = load(args.slm, slm_url=[args.slm_url], max_in_flight=8 * args.in_flight)
    served = reasoner.pair.served_slm
    assert served is not None
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    trigger = {"trigger": "random", "threshold": args.rate} if args.random else _threshold(reasoner, task, args)
    never = {"threshold": 0.0 if args.random else 1.0}
    ways: dict[str, tuple[bool, dict[str, Any]] | None] = {
        "plain": None,
        "greedy, criticality listed": (False, trigger | never),
        "s2t-local, listed": (False, trigger),
    }
    if served.has_plugin:
        ways |= {"greedy, plug-in": (True, trigger | never), "s2t-local, plug-in": (True, trigger)}
    prompts = [task.prompt(problem) for problem in task.problems("test", args.problems, 0)]
    rounds = [{name: _measure(reasoner, prompts, way, args) for name, way in ways.items()} for _ in range(args.repeats)]
    _show(rounds, {"problems": args.problems, "in_flight": args.in_flight, "trigger": trigger})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", required=True, help="folder that `s2t merge` wrote and that is served")
    parser.add_argument("--slm-url", required=True)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.02, help="share of steps that trigger")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--random", action="store_true", help="trigger at random steps, at the wanted rate")
    return parser.parse_args()


def _threshold(reasoner: Any, task: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The criticality that the wanted share of calibration steps exceeds."""
    known = [task.prompt(problem) for problem in task.problems("calibration", min(256, args.problems), 0)]
    read = reasoner.generate(known, threshold=1.0, trace=True, **_settings(args))
    values = [step.value for one in read for step in one.steps[WARMUP_STEPS:]]
    return {"threshold": threshold_at(np.array(values), 1 - args.rate)[0]}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {"max_new_tokens": args.max_new_tokens, "batch_size": args.in_flight}


def _measure(
    reasoner: Any, prompts: list[str], way: tuple[bool, dict[str, Any]] | None, args: argparse.Namespace
) -> dict[str, float]:
    """One way once: tokens/s, and what it asked of the server."""
    served = reasoner.pair.served_slm
    served.client.take_counts()
    before, start, cpu = _engine(args.slm_url), time.perf_counter(), time.process_time()
    facts: dict[str, float] = {}
    if way is None:
        ids = [reasoner.pair.prompt(prompt) for prompt in prompts]
        count = plain(reasoner, ids, args.max_new_tokens, args.in_flight)
    else:
        served.has_plugin, settings = way
        done = reasoner.generate(prompts, **settings, **_settings(args))
        count = sum(len(one.token_ids) for one in done)
        facts["trigger_rate"] = sum(one.num_triggered for one in done) / count
        facts["flip_rate"] = sum(one.num_flips for one in done) / count
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    counts = served.client.take_counts()
    after = _engine(args.slm_url)
    steps, rows = after[0] - before[0], after[1] - before[1]
    found = facts | {
        "tokens_per_s": count / seconds,
        "requests_per_token": counts.calls / count,
        "written_per_token": counts.completion_tokens / count,
        "rows_per_token": rows / count,
        "engine_steps": steps,
        "tokens_per_step": count / max(1.0, steps),
        "client_cpu_us_per_token": 1e6 * cpu / count,
    }
    print({name: round(value, 4) for name, value in found.items()}, file=sys.stderr, flush=True)
    return found


def _engine(url: str) -> tuple[float, float]:
    """Steps and finished sequences of the server so far."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as reply:
        lines = reply.read().decode().splitlines()
    steps, rows = "vllm:iteration_tokens_total_count", "vllm:e2e_request_latency_seconds_count"
    return _sum_of(lines, steps), _sum_of(lines, rows)


def _sum_of(lines: list[str], name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def _show(rounds: list[dict[str, dict[str, float]]], settings: dict[str, Any]) -> None:
    """Medians over rounds, each way's speed over plain's of the same round, and all of it as JSON."""
    facts = {
        name: {key: statistics.median(one[name][key] for one in rounds) for key in rounds[0][name]}
        for name in rounds[0]
    }
    rates = {name: [one[name]["tokens_per_s"] for one in rounds] for name in facts}
    ratios = {
        name: statistics.median(one[name]["tokens_per_s"] / one["plain"]["tokens_per_s"] for one in rounds)
        for name in facts
    }
    for name, found in rates.items():
        every = ", ".join(f"{rate:.0f}" for rate in found)
        print(f"{name:28} {facts[name]['tokens_per_s']:8.0f} tokens/s, {ratios[name]:.2f} of plain  ({every})")
    print(json.dumps(settings | {"ratios": ratios, "tokens_per_s": rates, "facts": facts}))


if __name__ == "__main__":
    main()
