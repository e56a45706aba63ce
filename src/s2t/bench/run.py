"""`bench`: build the contestants of one kind of work, let them run in turns, and report medians and ratios."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from s2t.bench.collect import CollectBench
from s2t.bench.decode import DecodeBench, local_name
from s2t.bench.limit import ALONE, LimitBench
from s2t.bench.timing import in_turns, machine, peak_memory_bytes, ratio
from s2t.bench.train import TrainBench
from s2t.config import BenchConfig
from s2t.model.load import pick_device
from s2t.progress import progress


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure one kind of work; medians over rounds, ratios of times within a round, shapes, machine and versions."""
    device = torch.device(pick_device(config.device))
    works = {"decode": DecodeBench, "collect": CollectBench, "train": TrainBench, "limit": LimitBench}
    work: Any = works[config.work](config)
    contestants = work.contestants()
    with progress(f"bench {config.work}", config.repeats + 1, unit="rounds") as advance:
        seconds = in_turns(contestants, device, config.repeats, 1, 4 * config.batch_size, lambda: advance(1))
    result = {
        "work": config.work,
        "slm": config.slm,
        "llm": config.llm,
        "dtype": config.dtype,
        "rounds": config.repeats,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        **{"decode": _decode, "collect": _collect, "train": _train, "limit": _limit}[config.work](
            config, work, seconds
        ),
        "peak_memory_bytes": peak_memory_bytes(device),
        **machine(device),
    }
    return result


def _decode(config: BenchConfig, work: DecodeBench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    tokens = config.batch_size * config.max_new_tokens
    result: dict[str, Any] = {
        "batch_size": config.batch_size,
        "prompt_tokens": config.prompt_tokens,
        "max_new_tokens": config.max_new_tokens,
        "tokens_per_s": {name: tokens / statistics.median(values) for name, values in seconds.items()},
        "slm_forwards_per_token": {name: cost.slm_forwards / cost.generated for name, cost in work.costs.items()},
        "local_time_to_greedy": {f"{rate:g}": ratio(seconds, local_name(rate), "greedy") for rate in config.rates},
    }
    if "transformers" in seconds:
        result["greedy_to_transformers"] = ratio(seconds, "transformers", "greedy")
    if work.llm is not None:
        result["drafted_to_step_by_step"] = ratio(seconds, "s2t step by step", "s2t drafted")
        result["llm_forwards_per_token"] = {
            name: cost.llm_forwards / cost.generated for name, cost in work.costs.items() if cost.llm_forwards
        }
    return result


def _collect(config: BenchConfig, work: CollectBench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        **work.facts(),
        "batch_size": config.batch_size,
        "groups_per_s": {name: len(work.groups[name]) / statistics.median(values) for name, values in seconds.items()},
        "prefill_to_step_by_step": ratio(seconds, "step by step", "prefill"),
    }


def _train(config: BenchConfig, work: TrainBench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "adapter_scope": config.adapter_scope,
        "prefix_tokens": config.prompt_tokens,
        "num_candidates": config.num_candidates,
        "groups": config.groups,
        "groups_per_s": config.groups / statistics.median(seconds["training step"]),
    }


def _limit(config: BenchConfig, work: LimitBench, seconds: dict[str, list[float]]) -> dict[str, Any]:
    local = local_name(config.rates[-1])
    return {
        "prompt_tokens": config.prompt_tokens,
        "max_new_tokens": config.max_new_tokens,
        "groups": config.groups,
        "time_to_products": {name: ratio(seconds, name, name + ALONE) for name in work.stages},
        "local_time_to_greedy": {
            str(size): ratio(seconds, f"{local}, batch {size}", f"rollout, batch {size}") for size in config.batches
        },
        "per_s": {name: count / statistics.median(seconds[name]) for name, count in work.counts.items()},
        "products_gflops_per_s": {
            name: found.flops / statistics.median(seconds[name + ALONE]) / 1e9 for name, found in work.products.items()
        },
    }
