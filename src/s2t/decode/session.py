"""Models, engines and an adapter held together, so that every workflow writes sequences in one call.

A session loads what a strategy needs and no more: the LLM's weights are never touched by strategies that
do not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from s2t.config import NEEDS_LLM, ModelConfig
from s2t.decode.loop import Decoder, Request
from s2t.decode.state import Reference
from s2t.decode.strategies import Strategy
from s2t.errors import ConfigError, ModelError
from s2t.model.adapter import SelectorReader, load_selector
from s2t.model.chat import prompt_ids
from s2t.model.engine import Engine
from s2t.model.load import LoadedModel, check_pair, load_model
from s2t.model.merged import is_merged, local_folder
from s2t.records import Cost, Step


@dataclass(slots=True)
class Generated:
    """One finished sequence; `steps` is filled only when asked for."""

    token_ids: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    finish_reason: str = ""
    num_triggered: int = 0
    num_flips: int = 0


@dataclass
class Session:
    """An SLM with its LLM and adapter where there are any, and engines of `batch_size` rows made at first use."""

    slm: LoadedModel
    llm: LoadedModel | None = None
    adapter: SelectorReader | None = None
    batch_size: int = 64

    @classmethod
    def open(cls, config: ModelConfig, strategies: Sequence[str], adapter: str | None, batch_size: int) -> Session:
        """Load the models that `strategies` need; raises ModelError or ConfigError, one line, when one is missing."""
        needs_llm = any(name in NEEDS_LLM for name in strategies)
        if needs_llm and config.llm is None:
            names = ", ".join(name for name in strategies if name in NEEDS_LLM)
            raise ConfigError(f"strategy {names} needs the LLM; pass --llm MODEL.")
        if "s2t-local" in strategies and adapter is None and not is_merged(local_folder(config.slm)):
            raise ConfigError("strategy s2t-local needs --adapter, a folder written by `s2t train`.")
        slm = load_model(config.slm, **config.load_options)
        loaded = load_selector(adapter, slm) if "s2t-local" in strategies else None
        llm = None
        if needs_llm:
            assert config.llm is not None
            llm = load_model(config.llm, **config.load_options)
            check_pair(slm, llm)
        return cls(slm, llm, loaded, batch_size)

    def prompt(self, text: str) -> list[int]:
        """Prompt ids of a user message; raises ModelError when it is empty."""
        ids = prompt_ids(self.slm.tokenizer, text)
        if not ids:
            raise ModelError("the prompt is empty after tokenizing; give some text.")
        return ids

    def decoder(self, strategy: Strategy, max_new_tokens: int, num_rows: int, trace: bool = False) -> Decoder:
        """A fresh decoder for a strategy, with no more rows than there are sequences."""
        rows = max(1, min(self.batch_size, num_rows))
        if strategy.name == "llm":
            return Decoder(Engine(self._llm(), rows), strategy, None, max_new_tokens, trace)
        uses_adapter = strategy.name == "s2t-local"
        engine = Engine(self.slm, rows, self.adapter if uses_adapter else None)
        reference = Reference(Engine(self._llm(), rows)) if strategy.needs_llm else None
        return Decoder(engine, strategy, reference, max_new_tokens, trace)

    def steps(self, strategy: Strategy, requests: Sequence[Request], max_new_tokens: int) -> Iterator[Step]:
        """The raw stream of steps of some requests, with everything traced; for streaming and tracing."""
        return self.decoder(strategy, max_new_tokens, len(requests), trace=True).run(requests)

    def run(
        self,
        strategy: Strategy,
        requests: Sequence[Request],
        max_new_tokens: int,
        keep_steps: bool = False,
        on_finish: Callable[[], None] | None = None,
        trace: bool | None = None,
    ) -> list[Generated]:
        """Write all requests and return their sequences in order; `on_finish` is called once per finished one.

        `trace` (as `keep_steps` unless given) has the kept steps carry candidates where nothing fired, too.
        """
        decoder = self.decoder(strategy, max_new_tokens, len(requests), keep_steps if trace is None else trace)
        place = {request.index: i for i, request in enumerate(requests)}
        done = [Generated() for _ in requests]
        for step in decoder.run(requests):
            sequence = done[place[step.request]]
            _add(sequence, step, keep_steps)
            if step.finish_reason is not None:
                cost = decoder.costs[step.request]
                sequence.cost = _as_llm_cost(cost) if strategy.name == "llm" else cost
                if on_finish is not None:
                    on_finish()
        return done

    def _llm(self) -> LoadedModel:
        if self.llm is None:
            raise ConfigError("this strategy needs the LLM; pass --llm MODEL.")
        return self.llm


def _add(sequence: Generated, step: Step, keep: bool) -> None:
    sequence.token_ids.append(step.token_id)
    sequence.num_triggered += step.fired
    sequence.num_flips += step.flip and step.fired
    if keep:
        sequence.steps.append(step)
    if step.finish_reason is not None:
        sequence.finish_reason = step.finish_reason


def _as_llm_cost(cost: Cost) -> Cost:
    return replace(
        Cost(cost.generated),
        llm_forwards=cost.slm_forwards,
        llm_processed=cost.slm_processed,
        llm_flops=cost.slm_flops,
    )
