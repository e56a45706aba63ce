"""`s2t` with the LLM on a vLLM server beside the LLM alone on that server: tokens/s, requests per token; the last line is JSON.

.venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model LLM --dtype float32 --port 8000 ...
python benchmarks/remote_llm.py --slm tiny:slm --llm tiny:llm --llm-url http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from s2t.api import load
from s2t.tasks.problems import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", default="tiny:slm")
    parser.add_argument("--llm", default="tiny:llm")
    parser.add_argument("--llm-url", required=True)
    parser.add_argument("--problems", type=int, default=128)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    reasoner = load(args.slm, llm=args.llm, llm_url=[args.llm_url])
    task = load_task("rg:gsm_symbolic,max_number=100", "plain")
    prompts = [task.prompt(problem) for problem in task.problems("test", args.problems, 0)]
    ways = {"llm alone": {"strategy": "llm"}, "s2t": {"strategy": "s2t", "threshold": args.threshold}}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    facts = {}
    for _ in range(args.repeats):
        for name, how in ways.items():
            reasoner.pair.take_report()
            start = time.perf_counter()
            done = reasoner.generate(prompts, max_new_tokens=256, batch_size=args.in_flight, **how)
            seconds = time.perf_counter() - start
            count = sum(len(one.token_ids) for one in done)
            report = reasoner.pair.take_report() or {}
            rates[name].append(count / seconds)
            facts[name] = {
                "requests_per_token": report["calls"] / count,
                "trigger_rate": sum(one.num_triggered for one in done) / count,
                "flip_rate": sum(one.num_flips for one in done) / count,
            }
            print(f"{name}: {rates[name][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    for name, found in rates.items():
        print(f"{name:12} {statistics.median(found):8.0f} tokens/s  ({', '.join(f'{rate:.0f}' for rate in found)})")
    print(json.dumps({"problems": args.problems, "tokens_per_s": rates, "facts": facts}))


if __name__ == "__main__":
    main()
