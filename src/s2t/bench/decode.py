"""Decoding: `transformers` generate, our greedy, and s2t-local at exact trigger rates; with an LLM, drafted s2t as well.

Random prompts of one length, stop ids ignored, prefill counted for all. An untrained adapter does: selection costs
what it costs, whatever it selects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from s2t.bench.shapes import open_model
from s2t.bench.timing import Contestant
from s2t.config import BenchConfig
from s2t.core.sampling import uniforms
from s2t.decode.label import label
from s2t.decode.loop import Decoder
from s2t.decode.reference import ModelReference
from s2t.errors import ConfigError
from s2t.methods.select import S2T, Divergence, S2TLocal
from s2t.methods.strategies import Strategy
from s2t.methods.triggers import Never, Random
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.engine import Engine
from s2t.model.loaded import LoadedModel
from s2t.records import Cost, Request


class DecodeBench:
    """The models, the prompts and the contestants of one `s2t bench decode`."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.base = self._open(config.slm)  # never sees an adapter
        self.adapter = untrained_adapter(self._open(config.slm), config.readout, config.scope)
        self.llm = self._open(config.llm, config.llm_load_options) if config.llm is not None else None
        generator = torch.Generator().manual_seed(config.seed)
        shape = (config.batch_size, config.prompt_tokens)
        self.prompts = torch.randint(4, self.base.vocab_size, shape, generator=generator)
        self.costs: dict[str, Cost] = {}
        self.threshold = 0.0

    def _open(self, name: str, options: dict[str, Any] | None = None) -> LoadedModel:
        config = self.config
        loaded = open_model(name, **(options or config.load_options), seed=config.seed)
        return replace(loaded, stop_ids=frozenset())

    def contestants(self) -> dict[str, Contestant]:
        """Name -> what runs it once."""
        runs: dict[str, Contestant] = {}
        if self.config.with_transformers:
            runs["transformers"] = self._generate
        runs["greedy"] = lambda: self._decode("greedy", Strategy("greedy", Never()))
        for rate in self.config.rates:
            runs[local_name(rate)] = lambda rate=rate: self._local(rate)
        if self.llm is not None:
            self.threshold = self._threshold(self.llm)
            for name, length in (("s2t step by step", 1), ("s2t drafted", 0)):
                runs[name] = lambda name=name, length=length: self._s2t(name, length)
        return runs

    def _generate(self) -> Iterator[object]:
        ids, length = self.prompts.to(self.base.device), self.config.max_new_tokens
        model: Any = self.base.model
        with torch.inference_mode():
            yield model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
            )

    def _local(self, rate: float) -> Iterator[object]:
        config = self.config
        strategy = Strategy("s2t-local", Random(), rate, S2TLocal(), config.num_candidates, seed=config.seed)
        return self._decode(local_name(rate), strategy, self.adapter, rate)

    def drafted(self, traces: bool = False) -> Iterator[object]:
        """s2t with drafts of its own length; with `traces` every step notes its candidates, as `eval --traces` has it."""
        return self._s2t("s2t drafted", 0, traces)

    def _s2t(self, name: str, draft_tokens: int, traces: bool = False) -> Iterator[object]:
        strategy = Strategy(
            "s2t",
            Divergence(),
            self.threshold,
            S2T(),
            self.config.num_candidates,
            draft_tokens=draft_tokens,
        )
        return self._decode(name, strategy, traces=traces)

    def _decode(
        self,
        name: str,
        strategy: Strategy,
        adapter: SelectorAdapter | None = None,
        rate: float = 0.0,
        traces: bool = False,
    ) -> Iterator[object]:
        config, rows = self.config, len(self.prompts)
        engine = Engine(adapter.loaded if adapter is not None else self.base, rows, adapter)
        reference = ModelReference(Engine(self.llm, rows)) if "llm" in strategy.needs and self.llm is not None else None
        decoder = Decoder(engine, strategy, reference, config.max_new_tokens, traces)
        keys = exact_keys(rate, rows, config.max_new_tokens, strategy.warmup_steps, config.seed)
        requests = [Request(i, ids, key) for (i, ids), key in zip(enumerate(self.prompts.tolist()), keys, strict=True)]
        yield from decoder.run(requests)
        self.costs[name] = sum(decoder.costs.values(), Cost())

    def _threshold(self, llm: LoadedModel) -> float:
        """The divergence that the wanted share of greedy steps exceeds."""
        decoder = Decoder(Engine(self.base, len(self.prompts)), Strategy("greedy", Never()), None, 64)
        prompts = self.prompts.tolist()
        written: list[list[int]] = [[] for _ in prompts]
        for step in decoder.run([Request(i, ids) for i, ids in enumerate(prompts)]):
            written[step.request].append(step.token_id)
        labels = label(self.base, llm, prompts, written, self.config.num_candidates)
        values = np.concatenate([found.divergence[3:] for found in labels])
        return float(np.quantile(values, 1 - self.config.rates[-1]))


def local_name(rate: float) -> str:
    return f"s2t-local {100 * rate:g} %"


def untrained_adapter(loaded: LoadedModel, readout: str, scope: str) -> SelectorAdapter:
    """A new adapter on a model, ready for inference, always of the same weights: it costs what a trained one costs.

    Under readout `rank` its LoRA is not the new one, which is greedy: flips have a cost, too.
    """
    torch.manual_seed(0)
    adapter = SelectorAdapter(loaded, AdapterConfig(loaded.name, loaded.fingerprint, readout=readout, scope=scope))
    if adapter.ranks:
        with torch.no_grad():
            for name, weight in adapter.trainable().items():
                if "lora_B" in name:
                    weight.normal_(0.0, 0.01)
    adapter.selector.eval().requires_grad_(False)
    return adapter


def exact_keys(rate: float, count: int, length: int, warmup_steps: int, seed: int) -> Sequence[str]:
    """Keys under which the random trigger fires exactly round(rate * length) times in every row of `length` tokens.

    Raises ConfigError where so many hardly fit behind the warm-up: such keys would be looked for without end.
    """
    wanted, free = round(rate * length), max(0, length - warmup_steps)
    if wanted > free or (wanted > rate * free + 8 * (free * rate * (1 - rate)) ** 0.5 + 1):
        raise ConfigError(
            f"trigger_rates {rate:g} of {length} tokens are {wanted}, and a trigger fires at {free} at most, behind the first "
            f"{warmup_steps}; lower it, or raise --max-new-tokens."
        )
    keys: list[str] = []
    attempt = 0
    while len(keys) < count:
        key = f"{len(keys)}/{attempt}"
        draws = uniforms(seed, key, length)[warmup_steps:]
        attempt += 1
        if int((draws < rate).sum()) == wanted:
            keys.append(key)
    return keys
