"""S2T-LOCAL beside plain greedy on one vLLM server: tokens/s, requests per token; the last line is JSON.

    s2t merge --adapter runs/train/adapter --out runs/merged      # scope always or stream, criticality reserved
    PYTHONPATH=src .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model runs/merged --dtype float32 \\
        --logits-processors s2t.integrations.vllm:SelectToThink --port 8000 ...
    python benchmarks/vllm.py --slm runs/merged --slm-url http://127.0.0.1:8000/v1

The threshold is set on calibration problems so that the wanted share of steps triggers; the ways take turns. With --random the
steps that trigger are drawn instead, for a selector that has learned nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from s2t.api import load
from s2t.core.calibration import threshold_at
from s2t.decode.remote.wire import CompletionRequest
from s2t.tasks.problems import load_task

WARMUP_STEPS = 3


def plain(reasoner: Any, prompts: list[list[int]], max_tokens: int, in_flight: int) -> int:
    """Plain greedy, a request a problem, nothing listed and nothing biased; the number of tokens."""
    stops = {"stop_token_ids": sorted(reasoner.session.stop_ids), "ignore_eos": True}

    async def work(client: Any) -> int:
        room = asyncio.Semaphore(in_flight)

        async def one(ids: list[int]) -> int:
            async with room:
                return len((await client.complete(CompletionRequest(ids, max_tokens, extra=stops))).token_ids)

        return sum(await asyncio.gather(*map(one, prompts)))

    return reasoner.session.served_slm.client.run(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", required=True, help="folder that `s2t merge` wrote and that is served")
    parser.add_argument("--slm-url", required=True)
    parser.add_argument("--problems", type=int, default=256)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.02, help="share of steps that trigger")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--random", action="store_true", help="trigger at random steps, at the wanted rate")
    args = parser.parse_args()

    reasoner = load(args.slm, slm_url=[args.slm_url], max_in_flight=8 * args.in_flight)
    client = reasoner.session.served_slm.client
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    settings = {"max_new_tokens": args.max_new_tokens, "batch_size": args.in_flight}
    trigger = {"trigger": "random", "threshold": args.rate}
    if not args.random:
        known = [task.prompt(problem) for problem in task.problems("calibration", args.problems, 0)]
        read = reasoner.generate(known, threshold=1.0, trace=True, **settings)
        values = [step.value for one in read for step in one.steps[WARMUP_STEPS:]]
        trigger = {"threshold": threshold_at(np.array(values), 1 - args.rate)[0]}

    prompts = [task.prompt(problem) for problem in task.problems("test", args.problems, 0)]
    ids = [reasoner.session.prompt(prompt) for prompt in prompts]
    served = reasoner.session.served_slm
    assert served is not None
    quiet = {"threshold": 1.0 if not args.random else 0.0}
    ways = {"greedy, criticality listed": (False, quiet), "s2t-local, listed": (False, {})}
    if served.has_plugin:
        ways |= {"greedy, plug-in": (True, quiet), "s2t-local, plug-in": (True, {})}
    rates: dict[str, list[float]] = {name: [] for name in ("plain", *ways)}
    facts: dict[str, Any] = {}
    for _ in range(args.repeats):
        start = time.perf_counter()
        count = plain(reasoner, ids, args.max_new_tokens, args.in_flight)
        rates["plain"].append(count / (time.perf_counter() - start))
        for name, (served.has_plugin, cut) in ways.items():
            client.take_counts()
            start, cpu = time.perf_counter(), time.process_time()
            done = reasoner.generate(prompts, **trigger | cut, **settings)
            seconds = time.perf_counter() - start
            count = sum(len(one.token_ids) for one in done)
            counts = client.take_counts()
            rates[name].append(count / seconds)
            facts[name] = {
                "requests_per_token": counts.calls / count,
                "generated_per_token": counts.completion_tokens / count,
                "trigger_rate": sum(one.num_triggered for one in done) / count,
                "flip_rate": sum(one.num_flips for one in done) / count,
                "client_cpu_share": (time.process_time() - cpu) / seconds,
            }
            print(
                f"{name}: {rates[name][-1]:.0f} tokens/s, plain {rates['plain'][-1]:.0f}", file=sys.stderr, flush=True
            )
    for name, found in rates.items():
        print(f"{name:28} {statistics.median(found):8.0f} tokens/s  ({', '.join(f'{rate:.0f}' for rate in found)})")
    usual = statistics.median(rates["plain"])
    ratios = {name: statistics.median(found) / usual for name, found in rates.items()}
    print(
        json.dumps(
            {"problems": args.problems, "trigger": trigger, "ratios": ratios, "tokens_per_s": rates, "facts": facts}
        )
    )


if __name__ == "__main__":
    main()
