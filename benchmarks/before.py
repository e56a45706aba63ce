"""The stages of `s2t bench limit` on another checkout and on this one, in turns: `python benchmarks/before.py CHECKOUT`.

Each checkout runs in a process of its own, one stage at a time while the other waits; the weight products alone are this one's.
Medians over rounds after one to warm up, a table, and a line of JSON last. `--cpu` takes CPU time, for a machine that is busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

PRODUCTS = " (products)"
Run = Callable[[], Any]


class Side:
    """A process with the stages of one checkout."""

    def __init__(self, checkout: Path, arguments: list[str]) -> None:
        command = [sys.executable, __file__, str(checkout), "--worker", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(checkout / "src")},
        )
        self.names: list[str] = self._answer()

    def seconds(self, name: str) -> float:
        """How long a stage takes, run now."""
        assert self.process.stdin is not None
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        with self.process:  # its pipes are closed, and it is waited for
            pass

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side ended before it answered; see above.")
        return json.loads(line)


def main(argv: list[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    args = _parser().parse_args(given)
    if args.worker:
        _work(args)
        return
    given.remove(str(args.checkout))
    with (
        closing(Side(Path(__file__).resolve().parents[1], given)) as after,
        closing(Side(args.checkout.resolve(), given)) as before,
    ):
        stages = [name for name in after.names if not name.endswith(PRODUCTS)]
        rounds = [{name: _turn(i, name, before, after) for name in stages} for i in range(args.repeats + 1)][1:]
    rows = {name: [statistics.median(one[name][i] for one in rounds) for i in range(3)] for name in stages}
    for name, (old, new, floor) in rows.items():
        of_floor = f"{old / floor:5.2f} -> {new / floor:5.2f} times its products"
        print(f"{name:32} {old:8.2f} -> {new:8.2f} s, {of_floor}, {old / new:.2f} times as fast")
    keys = ("before_s", "after_s", "products_s")
    print(json.dumps({name: dict(zip(keys, values, strict=True)) for name, values in rows.items()}))


def _turn(number: int, name: str, before: Side, after: Side) -> tuple[float, float, float]:
    """Seconds before, after, and of the products; who goes first changes from round to round."""
    if number % 2:
        old, new = before.seconds(name), after.seconds(name)
    else:  # the first round, too: what it runs is noted for its products
        new, old = after.seconds(name), before.seconds(name)
    return old, new, after.seconds(name + PRODUCTS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of the other checkout")
    parser.add_argument("--slm", default="random:qwen2.5-0.5b")
    parser.add_argument("--llm", help="drafts and labels, too")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-sizes", default="1,8,64")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--rate", default="0.03", help="share of steps that trigger")
    parser.add_argument("--groups", type=int, default=64, help="of a training step, on one prefix as long as a prompt")
    parser.add_argument("--only", help="stages whose names begin with this, comma-separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="CPU seconds")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _work(args: argparse.Namespace) -> None:
    runs = {
        name: run
        for name, run in _stages(args)
        if args.only is None or any(name.startswith(only) for only in args.only.split(","))
    }
    clock = time.process_time if args.cpu else time.perf_counter
    print(json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        start = clock()
        runs[line.rstrip("\n")]()
        print(json.dumps(clock() - start), flush=True)


def _stages(args: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """Name of a stage -> what runs it, by what both checkouts have; products where the checkout can note them."""
    from s2t.bench import decode as bench
    from s2t.bench.train import TrainBench
    from s2t.config import BenchConfig
    from s2t.decode.label import label

    sizes = [int(size) for size in args.batch_sizes.split(",")]
    config = BenchConfig(
        slm=args.slm,
        llm=args.llm,
        dtype=args.dtype,
        batch_size=max(sizes),
        prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.max_new_tokens,
        trigger_rates=args.rate,
        groups=args.groups,
        with_transformers=False,
    )
    decode = bench.DecodeBench(config)
    prompts, runs = decode.prompts, decode.contestants()
    local, own = bench.local_name(config.rates[-1]), bench.Decoder

    def decoding(name: str, size: int, trace: bool = False) -> Run:
        def run() -> None:
            decode.prompts = prompts[:size]
            bench.Decoder = (lambda *given: own(*given[:4], True)) if trace else own
            for _ in runs[name]():
                pass
            decode.prompts = prompts

        return run

    slm, adapted = decode.base.model, decode.adapter.base_model
    for size in sizes:
        yield from _beside(f"rollout, batch {size}", decoding("greedy", size), slm)
        yield from _beside(f"{local}, batch {size}", decoding(local, size), adapted)
    if decode.llm is not None:
        llm, texts, half = decode.llm, prompts.tolist(), prompts.shape[1] // 2
        both = (slm, llm.model)
        yield from _beside(f"s2t drafted, batch {max(sizes)}", decoding("s2t drafted", max(sizes)), *both)
        traced = decoding("s2t drafted", max(sizes), True)
        yield from _beside(f"s2t drafted, with traces, batch {max(sizes)}", traced, *both)
        parts = [ids[:half] for ids in texts], [ids[half:] for ids in texts]
        yield from _beside("labelling", lambda: label(decode.base, llm, *parts), *both)
    train = TrainBench(config)
    step = train.contestants()["training step"]
    yield from _beside(f"training step, {args.groups} groups", lambda: list(step()), train.trainer.adapter.base_model)


def _beside(name: str, run: Run, *models: Any) -> Iterator[tuple[str, Run]]:
    try:
        from s2t.bench.limit import Products
    except ImportError:
        yield name, run
        return
    products = Products(*models)

    def first() -> None:
        if products.noted:
            run()
            return
        with products.noting():
            run()

    yield name, first
    yield name + PRODUCTS, lambda: list(products.run())


if __name__ == "__main__":
    main()
