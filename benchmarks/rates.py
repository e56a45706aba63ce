"""Decoding at several batch sizes and trigger rates, one Markdown row a batch size: `python benchmarks/rates.py --slm NAME`.

Each row is one `s2t bench`: transformers, greedy and s2t-local at every rate in turns.
"""

from __future__ import annotations

import argparse

from s2t.bench import bench
from s2t.config import BenchConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slm", default="random:qwen2.5-0.5b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--execution", default="auto")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--rates", default="0,0.01,0.02,0.05,0.1")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    rates = [float(rate) for rate in args.rates.split(",")]
    print("| B | transformers, tokens/s | greedy, tokens/s | ratio |", *(f"{100 * rate:g} % |" for rate in rates))
    print("| --- | --- | --- | --- |", *("--- |" for _ in rates))
    for batch_size in args.batch_sizes:
        result = bench(
            BenchConfig(
                slm=args.slm,
                device=args.device,
                dtype=args.dtype,
                execution=args.execution,
                batch_size=batch_size,
                prompt_tokens=args.prompt_tokens,
                max_new_tokens=args.max_new_tokens,
                trigger_rates=args.rates,
                repeats=args.repeats,
            )
        )
        speed, local = result["tokens_per_s"], result["local_time_to_greedy"]
        head = f"| {batch_size} | {speed['transformers']:,.1f} | {speed['greedy']:,.1f} |"
        times = (f"{local[f'{rate:g}']:.2f} |" for rate in rates)
        print(head, f"{result['greedy_to_transformers']:.2f} |", *times, flush=True)


if __name__ == "__main__":
    main()
