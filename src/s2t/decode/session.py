"""Models, engines and an adapter held together, so that every workflow writes sequences in one call.

A session loads what a strategy needs and no more: the LLM's weights are never touched by strategies that
do not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from s2t.config import ModelConfig, RemoteConfig, ServedConfig
from s2t.core.support import resolve_support
from s2t.decode.context import context_length, fit
from s2t.decode.continuous import ContinuousDecoder
from s2t.decode.generated import Generated
from s2t.decode.label import ExactAt, Labels, label, label_by_text, label_listed
from s2t.decode.loop import Decoder, Request
from s2t.decode.needs import check_needs, needs_by_name
from s2t.decode.prompts import checked_ids, note_unread, variables_of, without_context
from s2t.decode.reference import BareReference, ModelReference, Reference
from s2t.decode.remote.llm import RemoteLLM, remote_settings
from s2t.decode.remote.reference import RemoteReference
from s2t.decode.remote.selector import check_served
from s2t.decode.remote.served import ServedSLM
from s2t.decode.remote.slm import RemoteDecoder
from s2t.decode.remote.writer import RemoteWriter
from s2t.decode.steps import StepTexts
from s2t.decode.text_reference import TextReference
from s2t.errors import ConfigError, ModelError
from s2t.methods.strategies import Strategy
from s2t.model.adapter import BRANCH_SCOPES, AdapterConfig, SelectorReader, load_selector
from s2t.model.chat import decode_ids, prompt_ids
from s2t.model.engine import Engine
from s2t.model.load import LoadedModel, load_model, load_without_weights
from s2t.model.outline import load_outline
from s2t.model.stops import Stops, cut
from s2t.model.text import VocabularyMap, same_tokens
from s2t.progress import count, note
from s2t.records import Cost, Step

R = TypeVar("R", bound=Request)


@dataclass
class Session:
    """An SLM with its LLM and adapter where there are any, and engines of `batch_size` rows made at first use.

    With `served_slm` the SLM's weights are on servers, and `slm` is what is known of it without them.
    """

    slm: LoadedModel
    llm: LoadedModel | RemoteLLM | None = None
    adapter: SelectorReader | None = None
    batch_size: int = 64
    served_slm: ServedSLM | None = None
    reads_bare: bool = False
    """Whether requests bring their prompt without its context, too."""
    variables: dict[str, Any] = field(default_factory=dict)
    """What chat templates are told beside the messages."""
    _made: dict[str, VocabularyMap | None] = field(default_factory=dict, repr=False)
    _facts: dict[str, bool] = field(default_factory=dict, repr=False)

    @property
    def vocabulary(self) -> VocabularyMap | None:
        """The map between two loaded models' tokens, made once; None for one model, or where both have the same tokens."""
        if not isinstance(self.llm, LoadedModel):
            return None
        if "map" not in self._made:
            self._made["map"] = None if self.has_one_tokenizer else VocabularyMap(self.slm, self.llm)
        return self._made["map"]

    @property
    def has_one_tokenizer(self) -> bool:
        """Whether there is one model, or two with the same tokens."""
        if self.llm is None:
            return True
        if "same" not in self._facts:
            self._facts["same"] = same_tokens(self.slm, self.llm)
        return self._facts["same"]

    def check_tokens(self) -> None:
        """Raise ModelError where the LLM is to be read beside the SLM and cannot be, for its tokens."""
        _ = self.vocabulary  # raises for a pair that cannot be mapped
        if isinstance(self.llm, RemoteLLM) and not self.has_one_tokenizer:
            raise ModelError(
                f"the tokenizer of {self.llm.outline.name} is not that of {self.slm.name}, and an LLM on servers is read by "
                "token; pass --llm the tokenizer of a model that shares the SLM's, or run the LLM in this process."
            )

    @classmethod
    def open(cls, config: ModelConfig, strategies: Sequence[str], adapter: str | None, batch_size: int) -> Session:
        """Load the models that `strategies` need; raises ModelError or ConfigError, one line, when one is missing."""
        check_needs(config, strategies, adapter)
        if isinstance(config, ServedConfig) and config.slm_urls:
            bases = [name.partition("@")[0] for name in strategies]
            return cls.served(config, config, bases, adapter, batch_size)
        needs = needs_by_name(config, strategies)
        needs_llm = any("llm" in found for found in needs.values())
        slm = load_model(config.slm, **config.load_options)
        loaded = load_selector(adapter, slm) if any("adapter" in found for found in needs.values()) else None
        session = cls(slm, open_llm(config) if needs_llm else None, loaded, batch_size, variables=variables_of(config))
        session.reads_bare = any("bare" in found for found in needs.values())
        if any("llm" in found for name, found in needs.items() if name != "llm"):
            session.check_tokens()
        _ = session.vocabulary  # raises for a pair that cannot be mapped
        session.note_unread()
        return session

    def note_unread(self) -> None:
        """Say on stderr which variables no chat template of the models reads."""
        note_unread(self.variables, [self.slm, *([self.llm] if self.llm is not None else [])])

    @classmethod
    def served(
        cls, config: ModelConfig, where: ServedConfig, strategies: Sequence[str], adapter: str | None, batch_size: int
    ) -> Session:
        """An SLM on servers, for `greedy` and `s2t-local`; loads no weights. Raises as `open`, and RemoteError."""
        if adapter is not None:
            raise ConfigError(
                f"a server runs what `s2t merge` writes: s2t merge --adapter {adapter} --out FOLDER; serve it, pass it as --slm."
            )
        check_served(strategies)
        slm = load_without_weights(config.slm, config.revision, config.trust_remote_code)
        served = ServedSLM.connect(
            slm, remote_settings(where, where.slm_urls), where.slm_lora, "s2t-local" in strategies
        )
        return cls(slm, batch_size=batch_size, served_slm=served, variables=variables_of(config))

    def prompt(
        self,
        messages: str | Sequence[dict[str, str]],
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Prompt ids of a user message, or of a list of messages; raises ModelError for what cannot be a prompt.

        `variables` are what the chat template is told beside the messages, over those of the session. Raises TooLong for
        what cannot become as few as `max_tokens` tokens.
        """
        told = self.variables | dict(variables or {})
        return checked_ids(self.slm, prompt_ids(self.slm.tokenizer, messages, system, told, max_tokens))

    def request(
        self,
        index: int,
        messages: str | Sequence[dict[str, str]],
        key: str = "",
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> Request:
        """A request for the answer to a user message, or to a list of messages, in the tokens of both models; as `prompt`."""
        own = None
        if self.llm is not None and not self.has_one_tokenizer:
            told = self.variables | dict(variables or {})
            own = checked_ids(self.llm, prompt_ids(self.llm.tokenizer, messages, system, told, max_tokens))
        ids = self.prompt(messages, system, variables, max_tokens)
        bare = self.prompt(without_context(messages), system, variables, max_tokens) if self.reads_bare else None
        return Request(index, ids, key, own, bare_prompt_ids=bare)

    def request_of_ids(self, index: int, ids: list[int], key: str = "") -> Request:
        """A request for the continuation of prompt ids; an LLM with other tokens reads their text."""
        own, vocabulary = None, self.vocabulary
        if vocabulary is not None:
            [found] = vocabulary.llm_codec.encode([vocabulary.slm_codec.join(ids)])
            own = checked_ids(vocabulary.llm, found)
        return Request(index, checked_ids(self.slm, ids), key, own)

    def tokenizer_of(self, strategy: str) -> PreTrainedTokenizerBase:
        """The tokenizer whose ids a strategy writes."""
        return self._any_llm().tokenizer if strategy == "llm" else self.slm.tokenizer

    def text(self, sequence: Generated, stop: Sequence[str] = (), strategy: str = "") -> str:
        """Text of a finished sequence, without the stop id or the stop string that ended it."""
        ids = sequence.token_ids
        if sequence.finish_reason == "stop" and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return cut(decode_ids(self.tokenizer_of(strategy), ids), stop)

    @property
    def selector(self) -> AdapterConfig | None:
        """The settings of what selects beside the SLM, here or on its servers; None where nothing does."""
        if self.served_slm is not None:
            return self.served_slm.selector.config if self.served_slm.selector is not None else None
        return self.adapter.config if self.adapter is not None else None

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together, by what the loaded models can read; None for no limit."""
        return context_length(model for model in (self.slm, self.llm) if isinstance(model, LoadedModel))

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a sequence of either model."""
        return self.slm.stop_ids | (self.llm.stop_ids if self.llm is not None else frozenset())

    def decoder(
        self,
        strategy: Strategy,
        max_new_tokens: int,
        num_rows: int,
        trace: bool = False,
        stop: Sequence[str] = (),
    ) -> Decoder | RemoteDecoder | RemoteWriter:
        """A fresh decoder for a strategy, with no more rows than there are sequences; `stop` are stop strings."""
        rows = max(1, min(self.batch_size, num_rows))
        ends = Stops(self.tokenizer_of(strategy.name), stop).ends if stop else None
        if self.served_slm is not None:
            return self.served_slm.decoder(strategy, max_new_tokens, trace, ends, rows)
        if strategy.name == "llm" and isinstance(self.llm, RemoteLLM):
            return RemoteWriter(self.llm, max_new_tokens, ends, stop)
        engine, reference = self._engines(strategy, rows)
        texts = StepTexts.of(self.slm.tokenizer, self.slm.name, strategy.step_end) if strategy.has_spans else None
        return Decoder(engine, strategy, reference, max_new_tokens, trace, ends, texts=texts)

    def continuous(
        self, strategy: Strategy, max_length: int, ends: Callable[[int, int], bool] | None = None
    ) -> ContinuousDecoder:
        """A decoder of `batch_size` rows for requests that come and go; see `decode.continuous`."""
        engine, reference = self._engines(strategy, self.batch_size)
        adapter = self.adapter
        is_read = adapter is not None and (adapter.scope in BRANCH_SCOPES or engine.adapter is adapter)
        reader = adapter if is_read and strategy.name != "llm" else None
        return ContinuousDecoder(engine, strategy, reference, max_length, ends, reader)

    def _engines(self, strategy: Strategy, rows: int) -> tuple[Engine, Reference | None]:
        """The engine that writes, and the LLM beside it where the strategy reads one."""
        if strategy.name == "llm":
            return Engine(self.local_llm(), rows), None
        engine = Engine(self.slm, rows, self.adapter if "adapter" in strategy.needs else None)
        if "bare" in strategy.needs:
            return engine, BareReference(Engine(self.slm, rows))
        return engine, self.reference(rows) if strategy.needs_llm else None

    def reference(self, num_rows: int) -> Reference:
        """The LLM beside so many rows: by token, by text, or on its servers."""
        self.check_tokens()
        if isinstance(self.llm, RemoteLLM):
            return RemoteReference(self.llm, num_rows)
        engine = Engine(self.local_llm(), num_rows)
        return ModelReference(engine) if self.vocabulary is None else TextReference(engine, self.vocabulary)

    def label(
        self,
        requests: Sequence[Request],
        generated: Sequence[Sequence[int]],
        num_candidates: int = 16,
        support_size: int = 64,
        kind: str = "llm-slm",
        support: str = "auto",
        exact_at: ExactAt | None = None,
    ) -> list[Labels]:
        """What both models say at every step of trajectories written for some requests; see `decode.label`.

        Of an LLM on servers, candidate probabilities are asked for at the steps that `exact_at` names; elsewhere those that
        it did not list share the rest equally.
        """
        self.check_tokens()
        prompts = [request.prompt_ids for request in requests]
        num_listed = self.llm.num_listed if isinstance(self.llm, RemoteLLM) else None
        support, support_size = resolve_support(support, support_size, kind, num_listed)
        settings = (num_candidates, support_size, kind, support)
        if isinstance(self.llm, RemoteLLM):
            return label_listed(self.slm, self.llm, prompts, generated, *settings, exact_at=exact_at)
        llm, vocabulary = self.local_llm(), self.vocabulary
        if vocabulary is None:
            return label(self.slm, llm, prompts, generated, *settings)
        own = [request.llm_prompt_ids or request.prompt_ids for request in requests]
        return label_by_text(vocabulary, prompts, own, generated, self.batch_size, *settings)

    def steps(
        self, strategy: Strategy, requests: Sequence[Request], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[Step]:
        """The raw stream of steps of some requests, with everything traced; for streaming and tracing."""
        requests, longest = self._fitted(strategy, requests, max_new_tokens)
        decoder = self.decoder(strategy, longest, len(requests), trace=True, stop=stop)
        return decoder.run(requests)

    def _fitted(
        self, strategy: Strategy, requests: Sequence[Request], max_new_tokens: int
    ) -> tuple[list[Request], int]:
        """The requests as the strategy reads them, cut to what the models read (not what servers do, which know it), and the
        longest answer among them.
        """
        is_remote = strategy.name == "llm" and isinstance(self.llm, RemoteLLM)
        fitted = fit(requests, max_new_tokens, None if is_remote else self.context_length)
        longest = max((request.max_new_tokens or 1 for request in fitted), default=1)
        return [as_read(strategy.name, request) for request in fitted], longest

    def run(
        self,
        strategy: Strategy,
        requests: Sequence[Request],
        max_new_tokens: int,
        keep_steps: bool = False,
        on_finish: Callable[[], None] | None = None,
        trace: bool | None = None,
        stop: Sequence[str] = (),
    ) -> list[Generated]:
        """Write all requests and return their sequences in order; `on_finish` is called once per finished one.

        A sequence ends with the token that completes a stop string in its text, as it does with a stop id.
        `trace` (as `keep_steps` unless given) has the kept steps carry candidates where nothing fired, too.
        """
        is_traced = keep_steps if trace is None else trace
        requests, longest = self._fitted(strategy, requests, max_new_tokens)
        decoder = self.decoder(strategy, longest, len(requests), is_traced, stop)
        place = {request.index: i for i, request in enumerate(requests)}
        done = [Generated() for _ in requests]
        shares = [1 / (request.max_new_tokens or longest) for request in requests]
        for step in decoder.run(requests):
            sequence, share = done[place[step.request]], shares[place[step.request]]
            sequence.add(step, keep_steps)
            is_last = step.finish_reason is not None
            count(is_last, 1 - share * step.index if is_last else share, 1)
            if is_last:
                cost = decoder.costs[step.request]
                sequence.cost = _as_llm_cost(cost) if strategy.name == "llm" else cost
                if on_finish is not None:
                    on_finish()
        return done

    def take_report(self) -> dict[str, Any] | None:
        """What asking the LLM's or the SLM's servers took since this was last called; None where there are none."""
        if self.served_slm is not None:
            return self.served_slm.take_report()
        return self.llm.take_report() if isinstance(self.llm, RemoteLLM) else None

    def local_llm(self) -> LoadedModel:
        """The LLM in this process; raises ConfigError where there is none."""
        llm = self._any_llm()
        if isinstance(llm, RemoteLLM):
            raise ConfigError("this needs the LLM's weights in this process; pass --llm MODEL without --llm-url.")
        return llm

    def _any_llm(self) -> LoadedModel | RemoteLLM:
        if self.llm is None:
            raise ConfigError("this strategy needs the LLM; pass --llm MODEL.")
        return self.llm


def open_llm(config: ModelConfig) -> LoadedModel | RemoteLLM:
    """The LLM that a config names: on its servers where it has some (no weights are loaded, and a line on stderr says what
    they can tell), else in this process.

    Raises ConfigError, ModelError or RemoteError, one line.
    """
    if config.llm is None:
        raise ConfigError(
            "the LLM is missing; pass --llm MODEL (with --llm-url the folder or hub id of its tokenizer)."
        )
    if not isinstance(config, RemoteConfig) or not config.llm_urls:
        return load_model(config.llm, **config.llm_load_options)
    outline = load_outline(config.llm, config.llm_revision, config.trust_remote_code)
    llm = RemoteLLM.open(outline, remote_settings(config))
    note(f"LLM {llm.name} at {', '.join(config.llm_urls)}: {llm.abilities.note()}")
    return llm


def as_read(strategy: str, request: R) -> R:
    """The request as a strategy reads it: the LLM alone reads its own prompt."""
    if strategy != "llm" or request.llm_prompt_ids is None:
        return request
    return replace(request, prompt_ids=request.llm_prompt_ids)


def _as_llm_cost(cost: Cost) -> Cost:
    return replace(
        Cost(cost.generated),
        llm_forwards=cost.slm_forwards,
        llm_processed=cost.slm_processed,
        llm_flops=cost.slm_flops,
    )
