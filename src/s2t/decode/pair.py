"""The models of a run, held together: prompts become requests, requests become sequences, trajectories become labels.

`decode.opening` opens a pair from settings. What a strategy decides stands in `s2t.methods`, the loop in `decode.loop`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from s2t.config import needs_of
from s2t.core.support import resolve_support
from s2t.decode.continuous import ContinuousDecoder
from s2t.decode.label import ExactAt, Labels, label, label_by_text, label_listed
from s2t.decode.loop import Decoder
from s2t.decode.reference import BareReference, ModelReference, Reference
from s2t.decode.remote.llm import RemoteLLM
from s2t.decode.remote.reference import RemoteReference
from s2t.decode.remote.selector import check_served
from s2t.decode.remote.served import ServedSLM
from s2t.decode.remote.slm import RemoteDecoder
from s2t.decode.remote.writer import RemoteWriter
from s2t.decode.steps import StepTexts
from s2t.decode.text_reference import TextReference
from s2t.errors import ConfigError, ContextError, ModelError
from s2t.methods.strategies import Strategy
from s2t.model.adapter import BRANCH_SCOPES, AdapterConfig, SelectorReader
from s2t.model.chat import decode_ids, prompt_ids
from s2t.model.engine import Engine
from s2t.model.loaded import LoadedModel
from s2t.model.stops import Stops, cut
from s2t.model.text import VocabularyMap, same_tokens
from s2t.progress import count
from s2t.records import Cost, Generated, Request, Step

R = TypeVar("R", bound=Request)


@dataclass
class Pair:
    """An SLM with its LLM and adapter where there are any, to be written with `batch_size` rows at once.

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

    # What the models are together

    @cached_property
    def has_one_tokenizer(self) -> bool:
        """Whether there is one model, or two with the same tokens."""
        return self.llm is None or same_tokens(self.slm, self.llm)

    @cached_property
    def vocabulary(self) -> VocabularyMap | None:
        """The map between two loaded models' tokens; None for one model, or where both have the same tokens."""
        if not isinstance(self.llm, LoadedModel) or self.has_one_tokenizer:
            return None
        return VocabularyMap(self.slm, self.llm)

    @property
    def selector_config(self) -> AdapterConfig | None:
        """The settings of what selects beside the SLM, here or on its servers; None where nothing does."""
        if self.served_slm is not None:
            return self.served_slm.selector.config if self.served_slm.selector is not None else None
        return self.adapter.config if self.adapter is not None else None

    @property
    def default_strategy(self) -> str:
        """What writes where nobody says: s2t-local where something selects beside the SLM."""
        return "greedy" if self.selector_config is None else "s2t-local"

    @cached_property
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together, by what the models can read; None for no limit."""
        lengths = [model.context_length for model in (self.slm, self.llm) if model is not None]
        return min((length for length in lengths if length), default=None)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a sequence of either model, where they have the same tokens; else those of the SLM."""
        return self.stop_ids_of("")

    def stop_ids_of(self, strategy: str) -> frozenset[int]:
        """Ids that end what a strategy writes, in the tokens of the model that writes it."""
        if self.llm is None:
            return self.slm.stop_ids
        if self.has_one_tokenizer:
            return self.slm.stop_ids | self.llm.stop_ids
        return self.llm.stop_ids if strategy == "llm" else self.slm.stop_ids

    def check_has(self, strategy: str, trigger: str = "auto") -> None:
        """Raise ConfigError where a strategy, or its trigger, needs a model that was not opened."""
        if self.served_slm is not None:
            check_served([strategy])
        needs = needs_of(strategy, trigger)
        if "llm" in needs and self.llm is None:
            raise ConfigError(f"strategy {strategy} needs the LLM; pass --llm MODEL, or s2t.load(llm=...).")
        if "adapter" in needs and self.selector_config is None:
            raise ConfigError(
                f"strategy {strategy} needs an adapter, a folder written by `s2t train`; pass --adapter FOLDER, "
                "or s2t.load(adapter=...)."
            )

    def check_tokens(self) -> None:
        """Raise ModelError where the LLM is to be read beside the SLM and cannot be, for its tokens."""
        _ = self.vocabulary  # raises for a pair that cannot be mapped
        if isinstance(self.llm, RemoteLLM) and not self.has_one_tokenizer:
            raise ModelError(
                f"the tokenizer of {self.llm.outline.name} is not that of {self.slm.name}, and an LLM on servers is read by "
                "token; pass --llm the tokenizer of a model that shares the SLM's, or run the LLM in this process."
            )

    def local_llm(self) -> LoadedModel:
        """The LLM in this process; raises ConfigError where there is none."""
        if isinstance(self.llm, LoadedModel):
            return self.llm
        where = "" if self.llm is None else " without --llm-url"
        raise ConfigError(f"this needs the LLM's weights in this process; pass --llm MODEL{where}.")

    # Text to tokens and back

    def prompt(
        self,
        messages: str | Sequence[dict[str, str]],
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        of: LoadedModel | RemoteLLM | None = None,
    ) -> list[int]:
        """Prompt ids of a user message, or of a list of messages, in the tokens of the SLM or of another model.

        `variables` are what the chat template is told beside the messages, over those of the pair. Raises ModelError for what
        cannot be a prompt, and TooLong for what cannot become as few as `max_tokens` tokens.
        """
        model = of or self.slm
        told = self.variables | dict(variables or {})
        return checked_ids(model, prompt_ids(model.tokenizer, messages, system, told, max_tokens))

    def request(
        self,
        index: int,
        messages: str | Sequence[dict[str, str]],
        system: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        reads_bare: bool | None = None,
    ) -> Request:
        """A request for the answer to a user message, or to a list of messages, in the tokens of both models; as `prompt`.

        Its random numbers depend on these messages. `reads_bare` (the pair's own unless given) says that it brings the prompt
        without its context, too.
        """
        told = (messages, system, variables, max_tokens)
        ids = self.prompt(*told)
        for_llm = None if self.llm is None or self.has_one_tokenizer else self.prompt(*told, of=self.llm)
        is_bare = self.reads_bare if reads_bare is None else reads_bare
        bare = self.prompt(without_context(messages), *told[1:]) if is_bare else None
        key = messages if isinstance(messages, str) and system is None else json.dumps([system, messages])
        return Request(index, ids, key, for_llm, bare_prompt_ids=bare)

    def request_of_ids(self, index: int, ids: list[int]) -> Request:
        """A request for the continuation of prompt ids; an LLM with other tokens reads their text."""
        for_llm, vocabulary = None, self.vocabulary
        if vocabulary is not None:
            [encoded] = vocabulary.llm_codec.encode([vocabulary.slm_codec.join(ids)])
            for_llm = checked_ids(vocabulary.llm, encoded)
        return Request(index, checked_ids(self.slm, ids), str(list(ids)), for_llm)

    def tokenizer_of(self, strategy: str) -> PreTrainedTokenizerBase:
        """The tokenizer whose ids a strategy writes."""
        if strategy != "llm":
            return self.slm.tokenizer
        self.check_has(strategy)
        assert self.llm is not None
        return self.llm.tokenizer

    def text(self, sequence: Generated, stop: Sequence[str] = (), strategy: str = "") -> str:
        """Text of a finished sequence, without the stop id or the stop string that ended it."""
        ids = sequence.token_ids
        if sequence.finish_reason == "stop" and ids[-1] in self.stop_ids_of(strategy):
            ids = ids[:-1]
        text = decode_ids(self.tokenizer_of(strategy), ids)
        return cut(text, stop) if stop else text

    # Writing

    def write(
        self,
        strategy: Strategy,
        requests: Sequence[Request],
        max_new_tokens: int,
        keep_steps: bool = False,
        on_finish: Callable[[], None] | None = None,
        trace: bool | None = None,
        stop: Sequence[str] = (),
        batch_size: int | None = None,
    ) -> list[Generated]:
        """Write all requests and return their sequences in order; `on_finish` is called once per finished one.

        A sequence ends with the token that completes a stop string in its text, as it does with a stop id.
        `trace` (as `keep_steps` unless given) has the kept steps carry candidates where nothing fired, too.
        """
        is_traced = keep_steps if trace is None else trace
        requests, longest = self._fitted(strategy, requests, max_new_tokens)
        decoder = self.decoder(strategy, longest, min(len(requests), batch_size or self.batch_size), is_traced, stop)
        place = {request.index: i for i, request in enumerate(requests)}
        written = [Generated() for _ in requests]
        shares = [1 / (request.max_new_tokens or longest) for request in requests]
        for step in decoder.run(requests):
            sequence, share = written[place[step.request]], shares[place[step.request]]
            sequence.add(step, keep_steps)
            is_last = step.finish_reason is not None
            count(is_last, 1 - share * step.index if is_last else share, 1)
            if is_last:
                cost = decoder.costs[step.request]
                sequence.cost = _as_llm_cost(cost) if strategy.name == "llm" else cost
                if on_finish is not None:
                    on_finish()
        return written

    def steps(
        self, strategy: Strategy, requests: Sequence[Request], max_new_tokens: int, stop: Sequence[str] = ()
    ) -> Iterator[Step]:
        """The raw stream of steps of some requests, as they are written; candidates only where something fired."""
        requests, longest = self._fitted(strategy, requests, max_new_tokens)
        return self.decoder(strategy, longest, len(requests), stop=stop).run(requests)

    def _fitted(
        self, strategy: Strategy, requests: Sequence[Request], max_new_tokens: int
    ) -> tuple[list[Request], int]:
        """The requests as the strategy reads them, cut to what the models read (not what servers do, which know it), and the
        longest answer among them.
        """
        is_remote = strategy.name == "llm" and isinstance(self.llm, RemoteLLM)
        length = None if is_remote else self.context_length
        fitted = []
        for request in requests:
            room = int(min(request.max_new_tokens or max_new_tokens, room_for(request, length)))
            fitted.append(replace(request, max_new_tokens=room))
        if strategy.name == "llm":
            fitted = [as_read("llm", request) for request in fitted]
        return fitted, max((request.max_new_tokens or 1 for request in fitted), default=1)

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
        engine, reference, texts = self._readers(strategy, rows)
        return Decoder(engine, strategy, reference, max_new_tokens, trace, ends, texts=texts)

    def continuous(
        self, strategy: Strategy, max_length: int, ends: Callable[[int, int], bool] | None = None
    ) -> ContinuousDecoder:
        """A decoder of `batch_size` rows for requests that come and go; see `decode.continuous`."""
        engine, reference, texts = self._readers(strategy, self.batch_size)
        adapter = self.adapter
        is_read = adapter is not None and (adapter.scope in BRANCH_SCOPES or engine.adapter is adapter)
        reader = adapter if is_read and strategy.name != "llm" else None
        return ContinuousDecoder(engine, strategy, reference, max_length, ends, reader, texts)

    def _readers(self, strategy: Strategy, rows: int) -> tuple[Engine, Reference | None, StepTexts | None]:
        """The engine that writes and, where the strategy reads them, the LLM beside it and the steps of the text."""
        rows = min([rows, *(model.most_rows for model in (self.slm, self.llm) if isinstance(model, LoadedModel))])
        if strategy.name == "llm":
            return self.local_llm().open_engine(rows), None, None
        texts = StepTexts.of(self.slm.tokenizer, self.slm.name, strategy.step_end) if strategy.has_spans else None
        engine = self.slm.open_engine(rows, self.adapter if "adapter" in strategy.needs else None)
        if "bare" in strategy.needs:
            return engine, BareReference(self.slm.open_engine(rows)), texts
        return engine, self.reference(rows) if "llm" in strategy.needs else None, texts

    def reference(self, num_rows: int) -> Reference:
        """The LLM beside so many rows: by token, by text, or on its servers."""
        if isinstance(self.llm, RemoteLLM):
            self.check_tokens()
            return RemoteReference(self.llm, num_rows)
        vocabulary, engine = self.vocabulary, self.local_llm().open_engine(num_rows)
        return ModelReference(engine) if vocabulary is None else TextReference(engine, vocabulary)

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
        for_llm = [request.llm_prompt_ids or request.prompt_ids for request in requests]
        return label_by_text(vocabulary, prompts, for_llm, generated, self.batch_size, *settings)

    def take_report(self) -> dict[str, Any] | None:
        """What asking the LLM's or the SLM's servers took since this was last called; None where there are none."""
        if self.served_slm is not None:
            return self.served_slm.take_report()
        return self.llm.take_report() if isinstance(self.llm, RemoteLLM) else None


def as_read(strategy: str, request: R) -> R:
    """The request as a strategy reads it: the LLM alone reads its own prompt."""
    if strategy != "llm" or request.llm_prompt_ids is None:
        return request
    return replace(request, prompt_ids=request.llm_prompt_ids)


def checked_ids(model: LoadedModel | RemoteLLM, ids: list[int]) -> list[int]:
    """The ids of a prompt; raises ModelError where there are none, or one that the model has no row for."""
    if not ids:
        raise ModelError("the prompt is empty after tokenizing; give some text.")
    if (least := min(ids)) < 0:
        raise ModelError(f"the prompt holds the id {least}; token ids are 0 to {model.vocab_size - 1}.")
    if max(ids) >= model.vocab_size:
        token = model.tokenizer.convert_ids_to_tokens(max(ids))
        raise ModelError(f"the prompt holds {token}, which {model.name} has no embedding for; take it out.")
    return ids


def room_for(request: Request, length: int | None, what: str = "the prompt") -> float:
    """Tokens that an answer may have where the models read `length` (None: any number); ContextError where there are none."""
    if length is None:
        return math.inf
    if (count := request.num_prompt_tokens) >= length:
        raise ContextError(
            f"{what} has {count} tokens, and the models read up to {length} of prompt and answer together; shorten it, or "
            "use models that read more."
        )
    return length - count


def _as_llm_cost(cost: Cost) -> Cost:
    return replace(
        Cost(cost.generated),
        llm_forwards=cost.slm_forwards,
        llm_processed=cost.slm_processed,
        llm_flops=cost.slm_flops,
    )


def without_context(messages: str | Sequence[dict[str, str]]) -> str | list[dict[str, str]]:
    """A prompt with the last sentence of its last message alone: what is asked, without what it is asked about."""
    if isinstance(messages, str):
        return _last_sentence(messages)
    return [*messages[:-1], messages[-1] | {"content": _last_sentence(messages[-1]["content"])}]


def _last_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?\n])\s+", text.strip())[-1]
