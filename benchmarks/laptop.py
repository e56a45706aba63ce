"""What s2t costs on llama.cpp: its greedy and s2t-local (readout rank, triggers at random) against llama.cpp's own plain loop.

    python benchmarks/laptop.py --model coder-0.5b.gguf --adapter ADAPTER [--torch FOLDER] [--threads 2] [--rounds 7]

All take turns in one process, over the same prompt and number of tokens, prompt included; medians of the rounds. Memory is the
peak of a process of its own for each. Run it on a quiet machine; the last line is JSON.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

PROMPT = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May? Reason step by step."
)


def main() -> None:
    config = parse()
    if config.alone:
        run_alone(config)
        return
    times = take_turns(config)
    rates = {name: config.tokens / statistics.median(seconds) for name, seconds in times.items()}
    plain = rates["llama.cpp"]
    memory = {name: peak(config, name) for name in ("llama.cpp", "greedy", f"s2t-local {config.rate:.0%}")}
    result = {
        "model": os.path.basename(config.model),
        "threads": config.threads,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "tokens": config.tokens,
        "rounds": config.rounds,
        "tokens_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "of_plain": {name: round(rate / plain, 3) for name, rate in rates.items()},
        "peak_mib": {name: round(value, 1) for name, value in memory.items()},
        "memory_of_plain": {name: round(value / memory["llama.cpp"], 3) for name, value in memory.items()},
    }
    if "torch" in rates:
        result["of_torch"] = {name: round(rate / rates["torch"], 2) for name, rate in rates.items()}
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--adapter", required=True, help="adapter of readout rank, scope step, of the same base")
    parser.add_argument("--torch", help="folder of the same model, to run on torch in bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rate", type=float, default=0.03, help="share of steps that trigger")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    return parser.parse_args()


def take_turns(config: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round of each contestant; one round before them warms up."""
    runs = contestants(config)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(config.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            count = sum(1 for _ in run())
            assert count == config.tokens, f"{name} wrote {count} tokens"
            if turn:
                times[name].append(time.perf_counter() - start)
        print(f"round {turn} of {config.rounds}", file=sys.stderr)
    return times


def contestants(config: argparse.Namespace) -> dict[str, Callable[[], Iterator[Any]]]:
    """Name -> what writes the tokens, one by one."""
    from s2t.config import DecodeConfig
    from s2t.decode.pair import Pair
    from s2t.methods.strategies import build_strategy
    from s2t.model.gguf.opening import open_model, open_selector
    from s2t.model.load import load_model

    loaded = open_model(config.model, {}, "llama.cpp", threads=config.threads)
    config.threads = loaded.threads
    slm = replace(loaded, stop_ids=frozenset())
    pair = Pair(slm, None, open_selector(config.adapter, slm), 1)
    greedy = build_strategy("greedy", DecodeConfig(), {})
    local = build_strategy("s2t-local", replace(DecodeConfig(), trigger="random", threshold=config.rate), {})
    local = replace(local, warmup_steps=0)
    ids = pair.prompt(PROMPT)
    runs: dict[str, Callable[[], Iterator[Any]]] = {"llama.cpp": lambda: plain_loop(slm, ids, config.tokens)}
    runs["greedy"] = lambda: pair.steps(greedy, [pair.request_of_ids(0, ids)], config.tokens)
    runs[f"s2t-local {config.rate:.0%}"] = lambda: pair.steps(local, [pair.request_of_ids(0, ids)], config.tokens)
    if config.torch:
        dense = Pair(replace(load_model(config.torch, dtype="bfloat16"), stop_ids=frozenset()), None, None, 1)
        runs["torch"] = lambda: dense.steps(greedy, [dense.request_of_ids(0, ids)], config.tokens)
    return runs


def plain_loop(slm: Any, ids: list[int], num_tokens: int) -> Iterator[int]:
    """llama.cpp's own greedy decoding: a context of its defaults, one token a call, the best logit."""
    import ctypes

    import numpy as np

    from s2t.model.gguf.library import llama

    api = llama()
    params = api.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = len(ids) + num_tokens, slm.threads, slm.threads
    context = api.llama_init_from_model(slm.weights.pointer, params)
    rows, tokens = slm.weights.num_rows, ids
    for _ in range(num_tokens):
        array = (api.llama_token * len(tokens))(*tokens)
        assert api.llama_decode(context, api.llama_batch_get_one(array, len(tokens))) == 0
        address = ctypes.cast(api.llama_get_logits_ith(context, -1), ctypes.c_void_p).value or 0
        logits = np.frombuffer((ctypes.c_float * rows).from_address(address), dtype=np.float32)
        tokens = [int(logits.argmax())]
        yield tokens[0]
    api.llama_free(context)


def peak(config: argparse.Namespace, name: str) -> float:
    """Peak memory of a process that runs one contestant alone, MiB."""
    words = [sys.executable, __file__, "--model", config.model, "--adapter", config.adapter, "--alone", name]
    words += ["--threads", str(config.threads), "--tokens", str(config.tokens), "--rate", str(config.rate)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def run_alone(config: argparse.Namespace) -> None:
    """One contestant, once; llama.cpp's own without torch in its process."""
    if config.alone == "llama.cpp":
        plain_alone(config)
    else:
        list(contestants(config)[config.alone]())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1024)  # not ru_maxrss, which a parent's memory counts in


def plain_alone(config: argparse.Namespace) -> None:
    """As a program that has llama-cpp-python alone runs it."""
    from llama_cpp import Llama

    model = Llama(config.model, n_ctx=512, n_threads=config.threads, verbose=False)
    model.create_completion(PROMPT, max_tokens=config.tokens, temperature=0.0)


if __name__ == "__main__":
    main()
