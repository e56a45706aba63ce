"""A checked body becomes a plan: prompt ids, strategy, limits, and one job per choice; or an ApiError that says what to change.

Random numbers get the keys that the Python interface gives them, so a served answer is that of `Reasoner.generate` (chat) or
`Reasoner.complete` (plain completions) with the same settings.
"""

from __future__ import annotations

import copy
import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from s2t.config import ServeConfig, read_variables
from s2t.decode.continuous import OwnRequest
from s2t.decode.pair import Pair, as_read
from s2t.errors import S2TError
from s2t.methods.sample import Sampling
from s2t.methods.strategies import Strategy
from s2t.model.chat import encode
from s2t.model.size import TooLong, check_size, least_tokens
from s2t.records import Request
from s2t.serve.backend import Job
from s2t.serve.errors import ApiError, clipped
from s2t.serve.schema import Body, ChatBody, CompletionBody

GREEDY_BELOW = 1e-5
"""Temperatures below this one ask for the likeliest token, whatever they are."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one request asks for; `jobs` are its choices, in order."""

    model: str
    strategy: str
    seed: int | None
    jobs: Sequence[Job]
    num_prompt_tokens: int
    stream: bool
    include_usage: bool
    num_top: int | None
    num_candidates: int | None
    """Candidates to report in the details of a token; None without details."""


class Intake:
    """Makes plans; used by one thread, with a tokenizer of its own."""

    def __init__(self, config: ServeConfig, name: str, pair: Pair, strategies: Mapping[str, Strategy]) -> None:
        self.config, self.name, self.strategies = config, name, strategies
        self.pair = _with_own_tokenizer(pair)
        self.max_length = longest(config, pair)
        self.default = next(iter(strategies))
        for loaded in (self.pair.slm, *([self.pair.llm] if self.pair.llm is not None else [])):
            least_tokens(loaded.tokenizer, "")  # reads the vocabulary once, before there are requests
        self._numbers = itertools.count()

    @property
    def models(self) -> list[str]:
        """Names that a request may give as its model."""
        return [self.name, *(f"{self.name}:{strategy}" for strategy in self.strategies)]

    @property
    def engine(self) -> dict[str, Any] | None:
        """What runs the model, with the length that this server takes; None for one on servers of its own."""
        if self.pair.served_slm is not None:
            return None
        return self.pair.slm.facts_at(self.max_length)

    def chat(self, body: ChatBody) -> Plan:
        """The plan of a chat; its prompt is what the model's chat template makes of the messages."""
        strategy = self._strategy(body)
        turns = [message.turn for message in body.messages]
        system = None if turns[0]["role"] == "system" else self.config.system
        limits = (body.max_tokens, body.max_completion_tokens)
        if None not in limits and limits[0] != limits[1]:
            raise ApiError(
                400, "max_tokens and max_completion_tokens are the same limit; give one of them.", "max_tokens"
            )
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
        try:
            variables = read_variables(body.chat_template_kwargs)
        except S2TError as error:
            raise ApiError(400, str(error), "chat_template_kwargs") from error
        try:
            request = self.pair.request(0, turns, system, body.variables | variables, self.max_length)
        except TooLong as error:
            raise self._too_long(f"at least {error.least} tokens of prompt", "messages") from error
        except S2TError as error:
            raise ApiError(400, str(error), "messages") from error
        return self._plan(body, strategy, [request])

    def completion(self, body: CompletionBody) -> Plan:
        """The plan of plain completions: a prompt's own tokens, or its text without a chat template."""
        strategy = self._strategy(body)
        try:
            requests = [self._request_of(prompt) for prompt in body.prompts]
        except TooLong as error:
            raise self._too_long(f"at least {error.least} tokens of prompt", "prompt") from error
        except S2TError as error:
            raise ApiError(400, str(error), "prompt") from error
        return self._plan(body, strategy, requests)

    def _request_of(self, prompt: str | list[int]) -> Request:
        if isinstance(prompt, str):
            check_size(self.pair.slm.tokenizer, prompt, self.max_length)
            ids = encode(self.pair.slm.tokenizer, prompt, add_special_tokens=True)
        else:
            ids = prompt
        if len(ids) > self.max_length:  # before an LLM with other tokens has to read them as text
            raise TooLong(len(ids), self.max_length)
        return self.pair.request_of_ids(0, ids)

    def _plan(self, body: Body, strategy: str, prompts: Sequence[Request]) -> Plan:
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream to be true.", "stream_options")
        if body.num_top is not None and self.pair.served_slm is not None:
            message = (
                "the servers that run the model do not tell log-probabilities free of reserved ids; leave logprobs out."
            )
            raise ApiError(400, message, "logprobs", "unsupported_parameter")
        seed, sampling = self._sampling(body, strategy)
        num_candidates = self.strategies[strategy].num_candidates if body.s2t.details else None
        asked = [count for count in (body.num_top, num_candidates) if count is not None]
        jobs = []
        seen: dict[str, int] = {}  # a prompt that comes again gets other random numbers, as `Reasoner.complete` has it
        for prompt in prompts:
            limit = self._limit(body, prompt)
            for _ in range(body.n or 1):
                place = seen[prompt.key] = seen.get(prompt.key, -1) + 1
                request = OwnRequest(
                    next(self._numbers),
                    prompt.prompt_ids,
                    f"{prompt.key}/{place}",
                    prompt.llm_prompt_ids,
                    limit,
                    sampling,
                    seed or 0,
                    max(asked) if asked else None,
                )
                jobs.append(Job(strategy, request, (*body.stops, *self.config.stop), bool(body.stream)))
        return Plan(
            model=body.model,
            strategy=strategy,
            seed=seed,
            jobs=jobs,
            num_prompt_tokens=sum(len(as_read(strategy, prompt).prompt_ids) for prompt in prompts),
            stream=bool(body.stream),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            num_top=body.num_top,
            num_candidates=num_candidates,
        )

    def _strategy(self, body: Body) -> str:
        """The strategy that the extension or the model's name asks for, else sample above temperature 0, else the default."""
        name, _, tag = (body.model, "", "") if body.model == self.name else body.model.rpartition(":")
        if body.model != self.name and (name != self.name or tag not in self.strategies):
            known = ", ".join(self.models)
            raise ApiError(
                404, f"model {clipped(body.model)!r} is not served; known: {known}.", "model", "model_not_found"
            )
        asked = body.s2t.strategy
        if asked is not None and asked not in self.strategies:
            known = ", ".join(self.strategies)
            raise ApiError(400, f"strategy {clipped(asked)!r} is not served; known: {known}.", "s2t.strategy")
        if asked is not None and tag and asked != tag:
            raise ApiError(400, f"the model's name asks for {tag}, s2t.strategy for {asked}; give one.", "s2t.strategy")
        temperature = body.temperature
        if temperature is not None and temperature < GREEDY_BELOW and (asked or tag) != "sample":
            temperature = 0.0  # as clients write it that divide by it
        strategy = asked or tag or ("sample" if temperature else self.default)
        if strategy not in self.strategies:  # sample, where the model runs on other servers
            names = " and ".join(self.strategies)
            message = f"this server writes with {names} alone, which take no samples; leave temperature at 0."
            raise ApiError(400, message, "temperature")
        if temperature and strategy != "sample":
            message = f"strategy {strategy} takes no samples; leave temperature at 0, or ask for strategy sample."
            raise ApiError(400, message, "temperature")
        if temperature == 0 and strategy == "sample":
            raise ApiError(400, "strategy sample needs a temperature above 0; ask for greedy instead.", "temperature")
        return strategy

    def _sampling(self, body: Body, strategy: str) -> tuple[int | None, Sampling | None]:
        """Seed (one by chance where none is given) and filters, for a strategy that draws random numbers."""
        draws = strategy == "sample" or self.strategies[strategy].trigger.is_random
        if not draws:
            return None, None
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        default = self.strategies[strategy].sampling
        if default is None:
            return seed, None
        temperature = default.temperature if body.temperature is None else max(body.temperature, GREEDY_BELOW)
        top_p = default.top_p if body.top_p is None else body.top_p
        return seed, replace(default, temperature=temperature, top_p=top_p)

    def _limit(self, body: Body, prompt: Request) -> int:
        """Tokens that may be written behind a prompt."""
        length = prompt.num_prompt_tokens
        asked = body.token_limit
        if length + (asked or 1) > self.max_length:
            wanted = f"{length} tokens of prompt" + (f" and {asked} of answer" if asked else "")
            raise self._too_long(wanted, "messages" if isinstance(body, ChatBody) else "prompt")
        return asked or min(self.config.max_new_tokens, self.max_length - length)

    def _too_long(self, wanted: str, param: str) -> ApiError:
        message = f"this server takes up to {self.max_length} tokens of prompt and answer together, got {wanted}."
        return ApiError(400, message, param, "context_length_exceeded")


def longest(config: ServeConfig, pair: Pair) -> int:
    """Tokens that prompt and answer may have together: the setting, or what models and servers can read, if that is less."""
    own = [pair.context_length]
    if pair.served_slm is not None:
        served = [model.get("max_model_len") for model in pair.served_slm.client.models()]
        own += [length - 1 for length in served if length]  # selecting writes one token behind the last
    return min([config.max_length, *(length for length in own if length)])


def _with_own_tokenizer(pair: Pair) -> Pair:
    """The pair with copies of the tokenizers, which two threads must not encode with at once."""
    llm = pair.llm
    found = replace(
        pair,
        slm=replace(pair.slm, tokenizer=copy.deepcopy(pair.slm.tokenizer)),
        llm=None if llm is None else replace(llm, tokenizer=copy.deepcopy(llm.tokenizer)),
    )
    _ = found.vocabulary  # made now, not at the first request
    return found
