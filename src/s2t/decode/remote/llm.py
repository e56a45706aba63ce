"""The LLM on servers: what is known of it here (tokenizer, size), what its servers can tell, and how they are asked.

No weights are loaded. What a server cannot tell costs exactness; `Abilities.note` says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from s2t.config import RemoteConfig
from s2t.core.support import spread
from s2t.decode.remote.abilities import Abilities, probe
from s2t.decode.remote.blocking import BlockingClient
from s2t.decode.remote.client import RemoteSettings, api_key_from
from s2t.decode.remote.counts import Prices
from s2t.decode.remote.wire import Completion, CompletionRequest, LogProbs
from s2t.model.outline import Outline


@dataclass(slots=True)
class Listed:
    """The LLM's likeliest tokens at T positions; ids are -1 where fewer were told."""

    ids: np.ndarray  # [T, S] int32
    logprobs: np.ndarray  # [T, S] float32

    @classmethod
    def of(cls, positions: Sequence[LogProbs], num_listed: int) -> Listed:
        """From the wire's dictionaries, the `num_listed` likeliest of each."""
        ids = np.full((len(positions), num_listed), -1, dtype=np.int32)
        logprobs = np.full((len(positions), num_listed), -np.inf, dtype=np.float32)
        for place, listed in enumerate(positions):
            best = sorted(listed.items(), key=lambda item: -item[1])[:num_listed]
            ids[place, : len(best)] = [i for i, _ in best]
            logprobs[place, : len(best)] = [value for _, value in best]
        return cls(ids, logprobs)

    @classmethod
    def joined(cls, parts: Sequence[Listed]) -> Listed:
        """One after the other; at least one."""
        return cls(np.concatenate([part.ids for part in parts]), np.concatenate([part.logprobs for part in parts]))

    def logits(self, size: int, forbidden_ids: Tensor) -> Tensor:
        """As masked logits on a vocabulary of `size` tokens, what is not listed sharing the rest; [T, size], float32."""
        place = forbidden_ids.device
        filled = spread(torch.from_numpy(self.ids).long().to(place), torch.from_numpy(self.logprobs).to(place), size)
        return filled.index_fill_(-1, forbidden_ids, float("-inf"))


@dataclass
class RemoteLLM:
    """An LLM behind an API, with the tokenizer and the size of the model that `--llm` names."""

    outline: Outline
    client: BlockingClient
    name: str
    abilities: Abilities
    context_length: int | None = None
    """Tokens of prompt and answer together that its servers read, one short: asking writes a token behind the last."""
    num_unknown: int = 0
    """Selections for which no server could rank the candidates, so that the SLM's first was kept."""

    @classmethod
    def open(cls, outline: Outline, settings: RemoteSettings) -> RemoteLLM:
        """Connect and find out what the servers can tell; raises RemoteError or ConfigError, one line, where none answers."""
        client = BlockingClient(settings, _IdsOfTexts(outline))
        try:
            name = client.model_name()
            abilities = client.run(lambda inner: probe(inner, name))
            lengths = [int(m["max_model_len"]) - 1 for m in client.models() if m.get("max_model_len")]
            return cls(outline, client, name, abilities, min(lengths, default=None))
        except BaseException:
            client.close()
            raise

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.outline.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.outline.vocab_size

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.outline.stop_ids

    @property
    def num_params(self) -> int | None:
        return self.outline.num_params

    def take_report(self) -> dict[str, Any]:
        """Where the LLM runs, how exact it is, and what asking it took since this was last called, as JSON values."""
        settings = self.client.settings
        counts, unknown = self.client.take_counts(), self.num_unknown
        self.num_unknown = 0
        return {
            "model": self.name,
            "urls": list(settings.urls),
            "is_exact": self.abilities.is_exact,
            "note": self.abilities.note(),
            "num_unknown_selections": unknown,
            **counts.as_dict(settings.prices),
        }

    @property
    def fingerprint(self) -> str:
        """What stands for the weights, which are not here."""
        return f"remote:{self.name}"

    @property
    def num_listed(self) -> int:
        """Likeliest tokens that are told per position."""
        return self.abilities.num_listed

    def read(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[Listed]:
        """The LLM's likeliest tokens for every token of some continuations, all asked for at once; [T] positions each."""
        asked = [self.requests(p, c, range(len(c))) for p, c in zip(prefixes, continuations, strict=True)]
        found = iter(self.answers([request for requests in asked for request in requests]))
        parts = [[next(found) for _ in requests] for requests in asked]
        return [Listed.joined(each) for each in parts]

    def answers(self, requests: Sequence[CompletionRequest]) -> list[Listed]:
        """The positions that each request asked for, in order, all requests in flight together."""
        return self.client.map(requests, self._listed_of)

    def requests(self, prefix: Sequence[int], tokens: Sequence[int], offsets: Sequence[int]) -> list[CompletionRequest]:
        """What to ask for the distributions that tokens at some offsets behind a prefix come from.

        One request for all of them where the server tells a prompt's log-probabilities, else one each. The likeliest tokens
        of a generated token are not asked for beside those of a prompt: vLLM's sampler garbles them where a request for
        listed ids is in the same batch.
        """
        n = self.num_listed
        if not self.abilities.prompt_logprobs:
            return [CompletionRequest([*prefix, *tokens[:at]], logprobs=n) for at in offsets]
        first, last = min(offsets), max(offsets)
        prompt = [*prefix, *tokens[: last + 1]]
        return [CompletionRequest(prompt, prompt_logprobs=n, num_prompt_skipped=len(prefix) + first)]

    def _listed_of(self, request: CompletionRequest, done: Completion) -> Listed:
        """All positions that a request asked for, in order."""
        if request.prompt_logprobs is None:
            return Listed.of(done.logprobs[:1], self.num_listed)
        prompt = done.prompt_logprobs[request.num_prompt_skipped :]
        return Listed.of([each for each in prompt if each is not None], self.num_listed)

    def logprobs_of(self, prefixes: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Exact log-probabilities of listed ids as the next token of some prefixes; [n], [n, K] -> [n, K], float32."""
        assert self.abilities.logprob_token_ids
        most = self.abilities.max_token_ids
        size = self.outline.vocab_size
        requests, places = [], []
        for row, (prefix, wanted) in enumerate(zip(prefixes, ids, strict=True)):
            known = [i for i in dict.fromkeys(wanted) if i < size]
            for start in range(0, len(known), most):
                requests.append(CompletionRequest(list(prefix), logprob_token_ids=known[start : start + most]))
                places.append(row)
        found: list[LogProbs] = [{} for _ in prefixes]
        for row, listed in zip(places, self.client.map(requests, lambda _, done: done.logprobs[0]), strict=True):
            found[row].update(listed)
        rows = [[found[row].get(i, -np.inf) for i in wanted] for row, wanted in enumerate(ids)]
        return np.asarray(rows, dtype=np.float32)


def remote_settings(config: RemoteConfig, slm_urls: tuple[str, ...] | None = None) -> RemoteSettings:
    """The client's settings from a command's, of the LLM's servers or of the SLM's; the key comes from the environment."""
    return RemoteSettings(
        config.llm_urls if slm_urls is None else slm_urls,
        config.llm_model if slm_urls is None else None,
        api_key_from(config.llm_api_key_env),
        config.max_in_flight,
        config.timeout_s,
        config.max_retries,
        patience_s=config.patience_s,
        prices=Prices(config.prompt_price, config.completion_price, config.cached_price),
    )


class _IdsOfTexts:
    """Token text -> id, for servers that name tokens by their text; the lowest id where several share one.

    The table is made at the first question. Parts of a character have no text of their own and are not known.
    """

    def __init__(self, outline: Outline) -> None:
        self._outline = outline

    @cached_property
    def _table(self) -> dict[str, int]:
        texts = self._outline.tokenizer.batch_decode([[i] for i in range(self._outline.vocab_size)])
        table: dict[str, int] = {}
        for i, text in enumerate(texts):
            if "\ufffd" not in text:
                table.setdefault(text, i)
        return table

    def __call__(self, text: str) -> int | None:
        return self._table.get(text)
