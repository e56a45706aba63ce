"""The bars of the project on a CPU, each against a named baseline of the same run: `python benchmarks/bars.py`.

Takes about thirteen minutes on two cores, prints a table, and ends with one line of JSON. Every section runs in a
process of its own, so that memory is its own; times are taken in turns (A B A B ...) after a warm-up, medians of ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import naive
from s2t.bench.collect import CollectBench
from s2t.bench.decode import DecodeBench, exact_keys, local_name, untrained_adapter
from s2t.bench.shapes import open_model
from s2t.bench.timing import in_turns, machine, memory_bytes, peak_memory_bytes, ratio
from s2t.bench.train import TrainBench
from s2t.config import BenchConfig, DecodeConfig, TaskConfig
from s2t.decode.label import label
from s2t.decode.opening import open_pair
from s2t.decode.pair import Pair
from s2t.decode.workload import open_task, requests_for
from s2t.methods.select import S2TLocal
from s2t.methods.strategies import Strategy, build_strategy
from s2t.methods.triggers import Random
from s2t.model.engine import Engine
from s2t.records import Request

CPU = torch.device("cpu")
SHAPE = "random:qwen2.5-0.5b"
PAIR = {"slm": "tiny:slm-unfiltered", "llm": "tiny:llm"}
RATE = 0.02

# key -> (what it is, the bar, whether the figure must be at least (+) or at most (-) that)
BARS: dict[str, tuple[str, float, str]] = {
    "greedy_b1": ("greedy tokens/s over transformers generate, B = 1", 1.0, "+"),
    "greedy_b8": ("greedy tokens/s over transformers generate, B = 8", 1.0, "+"),
    "local_b1": ("s2t-local time per token over greedy, 2 % triggers, B = 1", 1.10, "-"),
    "local_b32": ("s2t-local time per token over greedy, 2 % triggers, B = 32", 1.25, "-"),
    "tree_vs_naive": ("K uncached forwards over a triggered step, prefix 512", 5.0, "+"),
    "maj8_tokens": ("tokens of Maj@8 over s2t-local", 6.0, "+"),
    "maj8_time": ("time of Maj@8 over s2t-local", 4.0, "+"),
    "llm_forwards_per_token": ("LLM forwards per token of drafted s2t, 2 % triggers", 0.15, "-"),
    "collect": ("groups/s by prefill over step by step, one problem at a time", 5.0, "+"),
    "train_time": ("time of the naive K-copies step over ours, K = 16, prefix 512", 6.0, "+"),
    "train_memory": ("peak memory of the naive K-copies step over ours", 6.0, "+"),
    "decode_memory": ("peak memory of s2t-local over greedy, B = 8", 1.1, "-"),
}


def section_decode() -> dict[str, float]:
    """Seconds per round of contestants of `s2t bench` on the 0.5B shape, bfloat16, prefill included; models opened once."""
    bench = DecodeBench(BenchConfig(slm=SHAPE, batch_size=32, prompt_tokens=512, trigger_rates=str(RATE)))
    prompts = bench.prompts

    def times(batch_size: int, prompt: int, new: int, names: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
        start = time.perf_counter()
        bench.config = replace(bench.config, batch_size=batch_size, prompt_tokens=prompt, max_new_tokens=new)
        bench.prompts = prompts[:batch_size, :prompt]
        runs = bench.contestants()
        found = in_turns({name: runs[name] for name in names}, CPU, rounds, 1, 2 * batch_size)
        print(f"  {' and '.join(names)}, B = {batch_size}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        return found

    local = local_name(RATE)
    return {
        "greedy_b1": ratio(times(1, 512, 50, ("transformers", "greedy"), 3), "transformers", "greedy"),
        "greedy_b8": ratio(times(8, 64, 24, ("transformers", "greedy"), 3), "transformers", "greedy"),
        "local_b1": ratio(times(1, 128, 50, ("greedy", local), 3), local, "greedy"),
        "local_b32": ratio(times(32, 64, 50, ("greedy", local), 2), local, "greedy"),
    }


def section_same_tokens() -> dict[str, float]:
    """In float32, where random weights make no ties: every token of both is the same."""
    config = BenchConfig(slm=f"{SHAPE},layers=8", dtype="float32", batch_size=8, prompt_tokens=32, max_new_tokens=8)
    bench = DecodeBench(config)
    runs = bench.contestants()
    for batch_size in (8, 1):
        bench.prompts = bench.prompts[:batch_size]
        [reference] = list(runs["transformers"]())
        ours = sorted((step.request, step.index, step.token_id) for step in runs["greedy"]())  # type: ignore[attr-defined]
        assert isinstance(reference, torch.Tensor)
        assert [token for *_, token in ours] == reference[:, 32:].flatten().tolist(), "greedy differs from transformers"
    return {"same_tokens": 1.0}


def section_tree() -> dict[str, float]:
    """One triggered step: the row's token and its K candidates in one forward, against K forwards of the whole prefix."""
    loaded = open_model(SHAPE, "bfloat16", "cpu", False)
    adapter = untrained_adapter(loaded, "bins", "always")
    prompt = torch.randint(4, loaded.vocab_size, (512,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = Engine(loaded, 1, adapter)
    logits = engine.logits(engine.extend([0], [prompt]))
    logprobs, ids = logits.log_softmax(-1).topk(8)
    scores: dict[str, torch.Tensor] = {}

    def tree() -> Iterator[object]:
        hidden = engine.step([0], [[int(ids[0, 0])]], [0], ids)[1]
        engine.crop([0], [512])
        scores["tree"] = adapter.scores(hidden, ids, logprobs)[0]
        yield

    def slow() -> Iterator[object]:
        scores["naive"] = naive.score_candidates(adapter, prompt, ids[0].tolist(), logprobs[0])
        yield

    found = in_turns({"naive": slow, "tree": tree}, CPU, 2, 1)
    torch.testing.assert_close(scores["tree"], scores["naive"], rtol=0.05, atol=0.05)
    return {"tree_vs_naive": ratio(found, "naive", "tree")}


def _pair(strategies: list[str], batch_size: int = 64) -> tuple[Pair, list[Request], Callable[[int], list[Request]]]:
    config = BenchConfig(**PAIR, batch_size=batch_size)
    pair = open_pair(config, strategies)
    task = open_task(TaskConfig(), PAIR["slm"])
    problems = task.problems("train", 128, 0)
    return pair, requests_for(pair, task, problems), lambda n: requests_for(pair, task, problems, n)


def section_maj8() -> dict[str, float]:
    pair, requests, sampled = _pair([])
    pair.adapter = untrained_adapter(pair.slm, "rank", "step")
    local = Strategy("s2t-local", Random(), RATE, S2TLocal())
    sample = build_strategy("self-consistency", DecodeConfig(), {})
    tokens: dict[str, int] = {}

    def run(name: str, strategy: Strategy, work: list[Request]) -> Iterator[object]:
        tokens[name] = sum(len(sequence.token_ids) for sequence in pair.write(strategy, work, 256))
        yield

    found = in_turns(
        {"maj8": lambda: run("maj8", sample, sampled(8)), "local": lambda: run("local", local, requests)}, CPU, 2, 1
    )
    return {"maj8_tokens": tokens["maj8"] / tokens["local"], "maj8_time": ratio(found, "maj8", "local")}


def section_drafted() -> dict[str, float]:
    pair, requests, _ = _pair(["s2t"])
    assert pair.llm is not None
    greedy = pair.write(build_strategy("greedy", DecodeConfig(), {}), requests, 256)
    found = label(pair.slm, pair.llm, [r.prompt_ids for r in requests], [s.token_ids for s in greedy])
    threshold = float(np.quantile(np.concatenate([labels.divergence[3:] for labels in found]), 1 - RATE))
    done: dict[str, Any] = {}

    def run(name: str, length: int) -> Iterator[object]:
        strategy = build_strategy("s2t", DecodeConfig(threshold=threshold, draft_tokens=length), {})
        done[name] = pair.write(strategy, requests, 256)
        yield

    seconds = in_turns({"step by step": lambda: run("plain", 1), "drafted": lambda: run("drafted", 0)}, CPU, 2, 1)
    assert [s.token_ids for s in done["plain"]] == [s.token_ids for s in done["drafted"]], "drafting changed the output"
    tokens = sum(s.cost.generated for s in done["drafted"])
    return {
        "llm_forwards_per_token": sum(s.cost.llm_forwards for s in done["drafted"]) / tokens,
        "drafted_trigger_rate": sum(s.num_triggered for s in done["drafted"]) / tokens,
        "drafted_slm_forwards_per_token": sum(s.cost.slm_forwards for s in done["drafted"]) / tokens,
        "drafted_speedup": ratio(seconds, "step by step", "drafted"),
    }


def section_collect() -> dict[str, float]:
    """Labelling by prefill in batches of 64, against stepping both models: one problem at a time, and in the same batches."""
    base = BenchConfig(work="collect", **PAIR, batch_size=64, max_new_tokens=256, limit=64, trigger_rates="0.03")
    batched, alone = CollectBench(base), CollectBench(replace(base, batch_size=1))
    alone.threshold = batched.threshold
    runs = batched.contestants()
    found = in_turns(
        {
            "one at a time": alone.contestants()["step by step"],
            "batched": runs["step by step"],
            "prefill": runs["prefill"],
        },
        CPU,
        2,
        0,
    )
    slow, fast = {g[:2] for g in alone.groups["step by step"]}, {g[:2] for g in batched.groups["prefill"]}
    assert len(slow ^ fast) <= 0.02 * len(fast), "the groups differ by more than rounding at the threshold"
    return {
        "collect": ratio(found, "one at a time", "prefill") * len(fast) / len(slow),
        "collect_same_batch": ratio(found, "batched", "prefill"),
    }


def _train_bench() -> TrainBench:
    return TrainBench(
        BenchConfig(
            work="train",
            slm=f"{SHAPE},layers=4",
            prompt_tokens=512,
            num_candidates=16,
            readout="bins",
            adapter_scope="always",
        )
    )


def section_train_time() -> dict[str, float]:
    ours, slow = _train_bench(), _train_bench()
    losses: dict[str, float] = {}

    def naive_step() -> Iterator[object]:
        losses.setdefault("naive", naive.training_step(slow.trainer, slow.batch))
        yield

    ours_step = ours.contestants()["training step"]
    list(ours_step())  # the warm-up, and the loss of the very first step
    losses["ours"] = ours.loss
    found = in_turns({"naive": naive_step, "ours": ours_step}, CPU, 2, 0)
    assert abs(losses["naive"] / losses["ours"] - 1) < 0.02, losses
    return {"train_time": ratio(found, "naive", "ours")}


def section_train_memory_naive() -> dict[str, float]:
    bench = _train_bench()
    before = memory_bytes()
    naive.training_step(bench.trainer, bench.batch)
    return {"peak": peak_memory_bytes(CPU), "before": before}


def section_train_memory_ours() -> dict[str, float]:
    bench = _train_bench()
    before = memory_bytes()
    bench.trainer.one_step(bench.batch)
    return {"peak": peak_memory_bytes(CPU), "before": before}


def _decode_memory(with_selection: bool) -> dict[str, float]:
    loaded = replace(open_model(SHAPE, "bfloat16", "cpu", False), stop_ids=frozenset())
    adapter = untrained_adapter(loaded, "rank", "step")
    pair = Pair(loaded, None, adapter, 8)
    rate = RATE if with_selection else 0.0
    keys = exact_keys(rate, 8, 50, 3, 0)
    ids = torch.randint(4, loaded.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0)).tolist()
    requests = [Request(i, row, key) for (i, row), key in zip(enumerate(ids), keys, strict=True)]
    name = "s2t-local" if with_selection else "greedy"
    how = Strategy(name, Random(), rate, S2TLocal()) if with_selection else build_strategy(name, DecodeConfig(), {})
    before = memory_bytes()
    pair.write(how, requests, 50)
    return {"peak": peak_memory_bytes(CPU), "before": before}


def section_decode_memory_greedy() -> dict[str, float]:
    return _decode_memory(False)


def section_decode_memory_local() -> dict[str, float]:
    return _decode_memory(True)


def run_section(name: str) -> dict[str, float]:
    """Run one section in a fresh process; its last line is JSON."""
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__).resolve()), "--section", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure() -> dict[str, float]:
    """All figures: the bars, and what stands beside them."""
    found: dict[str, float] = {}
    for name in ("same_tokens", "decode", "tree", "maj8", "drafted", "collect", "train_time"):
        found |= run_section(name)
    for name, top, bottom in (("train_memory", "naive", "ours"), ("decode_memory", "local", "greedy")):
        one, other = run_section(f"{name}_{top}"), run_section(f"{name}_{bottom}")
        found[name] = one["peak"] / other["peak"]
        found[f"{name}_above_model"] = (one["peak"] - one["before"]) / (other["peak"] - other["before"])
    return found


def show(found: dict[str, float]) -> None:
    for key, (what, bar, sign) in BARS.items():
        is_met = found[key] >= bar if sign == "+" else found[key] <= bar
        relation = ">=" if sign == "+" else "<="
        print(f"{'met   ' if is_met else 'MISSED'} {found[key]:8.3f}  {relation} {bar:<5g} {what}")
    for key in found.keys() - BARS.keys():
        print(f"       {found[key]:8.3f}            {key}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--section", help="run one section in this process and print its figures as JSON")
    section = parser.parse_args().section
    if section is not None:
        print(json.dumps(globals()[f"section_{section}"]()))
        return
    start = time.perf_counter()
    found = measure()
    show(found)
    beside = {key: value for key, value in found.items() if key not in BARS}
    line = {key: found[key] for key in BARS} | {"beside": beside, "seconds": time.perf_counter() - start}
    print(json.dumps(line | machine(CPU)))


if __name__ == "__main__":
    main()
