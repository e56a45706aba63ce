"""Decoding speed on one machine: ours against `transformers` greedy `generate`, and selection against greedy.

Random prompts of one length, stop ids ignored, warm-up apart, the contestants measured in turns and reported as
medians and as ratios to a baseline of the same run. An untrained adapter does: selection costs what it costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from s2t.config import BenchConfig
from s2t.decode.loop import Decoder, Request
from s2t.decode.selectors import LocalSelector
from s2t.decode.strategies import Strategy
from s2t.decode.triggers import Never, Random
from s2t.files import versions
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.engine import Engine
from s2t.model.load import LoadedModel, load_model
from s2t.progress import progress


def bench(config: BenchConfig) -> dict[str, Any]:
    """Measure decoding and return medians: seconds, tokens/s, and ratios to transformers and to our greedy."""
    loaded = load_model(config.slm, config.dtype, config.device, config.trust_remote_code)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.prompt_tokens)
    prompts = torch.randint(4, loaded.vocab_size, shape, generator=generator)
    runs = _contestants(config, loaded, prompts)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with progress("bench", config.repeats * len(runs)) as advance:
        for round_number in range(config.repeats + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if round_number:  # the first round is the warm-up
                    seconds[name].append(time.perf_counter() - start)
                    advance(1)
    return _report(config, loaded, {name: statistics.median(values) for name, values in seconds.items()})


def _contestants(config: BenchConfig, loaded: LoadedModel, prompts: torch.Tensor) -> dict[str, Callable[[], None]]:
    endless = replace(loaded, stop_ids=frozenset())
    adapter = SelectorAdapter(endless, AdapterConfig(loaded.name, loaded.fingerprint, scope=config.adapter_scope))
    requests = [Request(i, ids, str(i)) for i, ids in enumerate(prompts.tolist())]

    def decode(strategy: Strategy, with_adapter: bool) -> None:
        engine = Engine(endless, len(requests), adapter if with_adapter else None)
        for _ in Decoder(engine, strategy, None, config.max_new_tokens).run(requests):
            pass
        _synchronize(loaded)

    def generate() -> None:
        adapter.act(False)
        ids = prompts.to(loaded.device)
        length = config.max_new_tokens
        with torch.inference_mode():
            model: Any = loaded.model
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
            )
        _synchronize(loaded)

    local = Strategy(
        "s2t-local", Random(), config.trigger_rate, LocalSelector(), config.num_candidates, seed=config.seed
    )
    return {
        "transformers generate": generate,
        "greedy": lambda: decode(Strategy("greedy", Never()), False),
        "s2t-local": lambda: decode(local, True),
    }


def _synchronize(loaded: LoadedModel) -> None:
    if loaded.device.type == "cuda":
        torch.cuda.synchronize(loaded.device)


def _report(config: BenchConfig, loaded: LoadedModel, seconds: dict[str, float]) -> dict[str, Any]:
    tokens = config.batch_size * config.max_new_tokens
    return {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
        "prompt_tokens": config.prompt_tokens,
        "max_new_tokens": config.max_new_tokens,
        "trigger_rate": config.trigger_rate,
        "seconds": seconds,
        "tokens_per_s": {name: tokens / value for name, value in seconds.items()},
        "greedy_vs_transformers": seconds["transformers generate"] / seconds["greedy"],
        "local_vs_greedy_time": seconds["s2t-local"] / seconds["greedy"],
        "versions": versions(),
    }
