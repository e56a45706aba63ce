"""What one GPU gives: `python benchmarks/gpu.py`; random weights, no download, at most eight minutes, one line of JSON last.

Greedy decoding at batch 1 against transformers' `generate` (eager and static cache) and against the card's bandwidth, which a
copy measures; s2t-local over greedy at four batch sizes; a triggered step; drafted s2t against its LLM alone; every stage over
its own matrix products; and whether all ways of running a step write the same tokens in float32. Contestants run in turns after
a warm-up round; a section that would begin after `--minutes` is left out and named. `--shape tiny` does it all on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from s2t.bench import bench
from s2t.bench.decode import DecodeBench, local_name
from s2t.bench.timing import Contestant, in_turns, machine, ratio
from s2t.config import BenchConfig
from s2t.decode.loop import Decoder
from s2t.methods.strategies import Strategy
from s2t.methods.triggers import Never
from s2t.model.engine import Engine
from s2t.model.load import pick_device
from s2t.records import Request

WAYS = ("eager", "static", "compile")  # of running a step; static is CUDA graphs on a GPU


@dataclass(frozen=True)
class Shape:
    """The models and sizes of one run."""

    slm: str
    llm: str
    small: str  # for what is run in float32
    dtype: str = "bfloat16"
    prompt: int = 128
    tokens: int = 256
    batches: tuple[int, ...] = (1, 8, 64, 256)
    rate: float = 0.03


SHAPES = {
    "card": Shape("random:qwen2.5-1.5b", "random:qwen2.5-14b", "random:qwen2.5-0.5b,layers=4"),
    "tiny": Shape("tiny:slm-small", "tiny:llm", "tiny:slm-small", "float32", 16, 16, (1, 4)),
}


class Card:
    """The sections; each returns figures by name."""

    def __init__(self, shape: Shape, ways: tuple[str, ...]) -> None:
        self.shape, self.ways = shape, ways
        self.device = torch.device(pick_device("auto"))
        self.bandwidth = 0.0  # bytes/s

    def config(self, **changes: Any) -> BenchConfig:
        shape = self.shape
        common = {"dtype": shape.dtype, "prompt_tokens": shape.prompt, "max_new_tokens": shape.tokens, "repeats": 2}
        return BenchConfig(**({"slm": shape.slm, "trigger_rates": str(shape.rate)} | common | changes))

    def turns(self, runs: dict[str, Contestant]) -> dict[str, list[float]]:
        return in_turns(runs, self.device, rounds=2, warmup_rounds=1, chunk=2**30)

    def section_bandwidth(self) -> dict[str, float]:
        """Bytes read and written in a second by a copy that no cache holds."""
        size = 2**30 if self.device.type == "cuda" else 2**27
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)

        def copies() -> Iterator[object]:
            for _ in range(10):
                target.copy_(source)
            yield

        self.bandwidth = 20 * size / min(self.turns({"copy": copies})["copy"])
        return {"gb_per_s": self.bandwidth / 1e9}

    def section_greedy(self) -> dict[str, Any]:
        """Batch 1: our three ways, transformers with a growing and a static cache, and reading all weights once a token."""
        work = DecodeBench(self.config(batch_size=1))
        runs: dict[str, Contestant] = {"transformers": work.contestants()["transformers"]}
        runs["transformers, static cache"] = lambda: self._generate_static(work)
        for way in self.ways:
            runs[way] = lambda way=way: self._greedy(work, way)
        seconds = self.turns(runs)
        weights = sum(p.numel() * p.element_size() for p in work.base.model.parameters())
        limit = self.bandwidth / weights
        speeds = {name: self.shape.tokens / min(values) for name, values in seconds.items()}
        return {
            "tokens_per_s": speeds,
            "bandwidth_limit_tokens_per_s": limit,
            "of_limit": {name: speed / limit for name, speed in speeds.items()},
            "over_transformers": {way: ratio(seconds, "transformers", way) for way in self.ways},
        }

    def _generate_static(self, work: DecodeBench) -> Iterator[object]:
        ids, model = work.prompts.to(self.device), work.base.model
        length = self.shape.tokens
        limits = {"min_new_tokens": length, "max_new_tokens": length}
        with torch.inference_mode():
            yield model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
                **limits,
            )

    def _greedy(self, work: DecodeBench, way: str) -> Iterator[object]:
        engine = Engine(work.base, len(work.prompts), execution=way)
        decoder = Decoder(engine, Strategy("greedy", Never()), None, work.config.max_new_tokens)
        yield from decoder.run([Request(i, ids) for i, ids in enumerate(work.prompts.tolist())])

    def section_local(self) -> dict[str, Any]:
        """Time of s2t-local over greedy by batch size, and what a step costs in which every row triggers."""
        work = DecodeBench(self.config(batch_size=max(self.shape.batches), with_transformers=False))
        prompts, over, speed = work.prompts, {}, {}
        name = local_name(self.shape.rate)
        for size in self.shape.batches:
            work.prompts = prompts[:size]
            runs = work.contestants()
            seconds = self.turns({kind: runs[kind] for kind in ("greedy", name)})
            over[str(size)] = ratio(seconds, name, "greedy")
            speed[str(size)] = size * self.shape.tokens / min(seconds["greedy"])
        return {"local_over_greedy": over, "greedy_tokens_per_s": speed, "triggered_step": self._triggered(work)}

    def _triggered(self, work: DecodeBench) -> float:
        """At batch 1, readout rank: one more row in the step."""
        engine = Engine(work.adapter.loaded, 1, work.adapter)
        prompt = work.prompts[0].tolist()
        engine.reserve(len(prompt) + 2)
        engine.extend([0], [prompt])
        last = torch.tensor([[prompt[-1]]], device=engine.device)

        def steps(*branch: Any) -> Iterator[object]:
            for _ in range(20):
                engine.step([0], [[5]], *branch)
                engine.crop([0], [len(prompt)])
            yield

        return ratio(self.turns({"ordinary": steps, "fired": lambda: steps([0], last, 1)}), "fired", "ordinary")

    def section_drafted(self) -> dict[str, Any]:
        """s2t with drafts against its LLM alone, batch 1."""
        work = DecodeBench(self.config(batch_size=1, llm=self.shape.llm, with_transformers=False))
        runs = work.contestants()
        llm = replace_base(work)
        seconds = self.turns({"s2t drafted": runs["s2t drafted"], "llm": lambda: self._greedy(llm, "auto")})
        cost = work.costs["s2t drafted"]
        return {
            "tokens_per_s": {name: self.shape.tokens / min(values) for name, values in seconds.items()},
            "over_llm_alone": ratio(seconds, "llm", "s2t drafted"),
            "llm_forwards_per_token": cost.llm_forwards / cost.generated,
        }

    def section_limit(self) -> dict[str, Any]:
        """Every stage over its own matrix products: `s2t bench limit` with a small LLM."""
        small = self.shape.slm if self.device.type == "cuda" else self.shape.llm
        sizes = ",".join(str(size) for size in self.shape.batches if size <= 64)
        config = self.config(work="limit", llm=small, batch_sizes=sizes, groups=16)
        found = bench(replace(config, max_new_tokens=min(64, self.shape.tokens)))
        return {name: found[name] for name in ("time_to_products", "per_s", "products_gflops_per_s")}

    def section_same_tokens(self) -> dict[str, Any]:
        """In float32 all ways write the same."""
        work = DecodeBench(self.config(slm=self.shape.small, dtype="float32", batch_size=3, max_new_tokens=16))
        written = {}
        for way in self.ways:
            steps: list[Any] = list(self._greedy(work, way))
            written[way] = sorted((step.request, step.index, step.token_id) for step in steps)
        return {way: written[way] == written[self.ways[0]] for way in self.ways}


def replace_base(work: DecodeBench) -> DecodeBench:
    """The same prompts and settings for the LLM alone."""
    alone = object.__new__(DecodeBench)
    alone.__dict__.update(work.__dict__)
    assert work.llm is not None
    alone.base = work.llm
    return alone


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="card")
    parser.add_argument("--minutes", type=float, default=6.5, help="no section begins later")
    parser.add_argument("--sections", default="bandwidth,greedy,same_tokens,local,drafted,limit")
    parser.add_argument("--ways", default=",".join(WAYS), help="of running a step")
    given = parser.parse_args(arguments)
    card, begin = Card(SHAPES[given.shape], tuple(given.ways.split(","))), time.perf_counter()
    result: dict[str, Any] = {"shape": given.shape, **machine(card.device)}
    for name in given.sections.split(","):
        if time.perf_counter() - begin > 60 * given.minutes:
            result[name] = "left out: no time"
            continue
        section: Callable[[], dict[str, Any]] = getattr(card, f"section_{name}")
        try:
            result[name] = section()
        except (RuntimeError, torch.OutOfMemoryError) as error:  # the others still count
            result[name] = f"failed: {' '.join(str(error).split())[:300]}"
        gc.collect()
        if card.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - begin:.0f} s\n{json.dumps(result[name], indent=1)}", file=sys.stderr)
    result["seconds"] = time.perf_counter() - begin
    print(json.dumps(result))


if __name__ == "__main__":
    main()
