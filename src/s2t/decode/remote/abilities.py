"""What a server can tell of a model's distribution, found out once by asking, and what its limits cost in exactness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from s2t.decode.remote.client import Client
from s2t.decode.remote.wire import BadReply, CompletionRequest, parse_completion
from s2t.errors import RemoteError

_LISTED = (20, 5, 1)  # vLLM's limit, that of OpenAI's completions, and the least that is of use
_TEST_IDS = [0, 1, 2]
_TRIES = 3  # for a reply that may be garbled


@dataclass(frozen=True, slots=True)
class Abilities:
    """What all servers of one model can do."""

    prompt_logprobs: bool
    """The likeliest tokens at every place of a prompt: a whole draft or trajectory is one request."""
    logprob_token_ids: bool
    """The log-probabilities of ids of our choice: candidates are ranked exactly, always."""
    speaks_ids: bool
    """Tokens are named by id; else by text, which may stand for several."""
    num_listed: int
    """Likeliest tokens told per position."""
    max_token_ids: int = 64
    """Ids of our choice per request."""

    def both(self, other: Abilities) -> Abilities:
        """What two servers can both do."""
        return Abilities(
            self.prompt_logprobs and other.prompt_logprobs,
            self.logprob_token_ids and other.logprob_token_ids,
            self.speaks_ids and other.speaks_ids,
            min(self.num_listed, other.num_listed),
            min(self.max_token_ids, other.max_token_ids),
        )

    @property
    def is_exact(self) -> bool:
        """Whether selections and candidate probabilities are those of the LLM in this process."""
        return self.logprob_token_ids and self.speaks_ids

    def note(self) -> str:
        """One line: what there is, and what is lost by what there is not."""
        parts = [f"divergence on the LLM's {self.num_listed} likeliest tokens and the rest"]
        parts.append(
            "one request per draft (prompt_logprobs)"
            if self.prompt_logprobs
            else "no prompt_logprobs, so one request per token"
        )
        parts.append(
            "candidate probabilities exact (logprob_token_ids)"
            if self.logprob_token_ids
            else f"no logprob_token_ids, so candidates outside the {self.num_listed} share the rest equally, and where none is "
            "inside the SLM's first is kept"
        )
        if not self.speaks_ids:
            parts.append("tokens named by text, so those that share their text are taken for the first of them")
        return "; ".join(parts)


async def probe(client: Client, model: str) -> Abilities:
    """What every server that answers can do; raises RemoteError where none answers or none lists log-probabilities."""
    found: Abilities | None = None
    failure: RemoteError | None = None
    for server in client.servers.all:
        try:
            own = await _probe_one(client, server.url, model)
        except RemoteError as error:  # it may be back later, and counts as able until it is seen to fail
            failure = error
            continue
        found = own if found is None else found.both(own)
    if found is None:
        assert failure is not None
        raise failure
    client.speaks_ids = found.speaks_ids
    return found


async def _probe_one(client: Client, url: str, model: str) -> Abilities:
    async def asks(request: CompletionRequest, speaks_ids: bool, fits: Callable[[Any], bool]) -> Any:
        """A reply that fits; None where the server refuses, or answers something else however often it is asked."""
        for _ in range(_TRIES):
            reply = await client.try_once(url, request.body(model, speaks_ids))
            if reply is None or fits(reply):
                return reply
        return None

    prompt = [3, 4]
    for count in _LISTED:
        for asks_ids in (True, False):
            plain = CompletionRequest(prompt, logprobs=count)
            both = CompletionRequest(prompt, logprobs=count, prompt_logprobs=count)
            ids = CompletionRequest(prompt, logprob_token_ids=_TEST_IDS)
            reply = await asks(plain, asks_ids, lambda reply: bool(_listed(reply)))
            if reply is None:
                continue
            listed = _listed(reply)
            speaks_ids = asks_ids and all(str(token).startswith("token_id:") for token in listed)
            has_prompt = await asks(both, asks_ids, partial(_answers, both)) is not None
            has_ids = speaks_ids and await asks(ids, asks_ids, partial(_answers, ids)) is not None
            return Abilities(has_prompt, has_ids, speaks_ids or _has_ids(reply), min(count, len(listed)))
    raise RemoteError(
        f"{url} gives no log-probabilities for prompts of token ids, which selection reads; use a completions API that does "
        "(vLLM, SGLang, llama.cpp server)."
    )


def _answers(request: CompletionRequest, reply: Any) -> bool:
    """Whether a reply has all that a request asked for."""
    try:
        parse_completion(reply, request, lambda _: -1)
    except BadReply:
        return False
    return True


def _content(reply: Any) -> dict[str, Any]:
    try:
        return reply["choices"][0]["logprobs"] or {}
    except (KeyError, IndexError, TypeError):
        return {}


def _listed(reply: Any) -> list[str]:
    """The tokens listed at the first generated token, as they are named."""
    found = _content(reply)
    if found.get("content"):
        return [each.get("token") for each in found["content"][0].get("top_logprobs") or []]
    return list((found.get("top_logprobs") or [{}])[0] or {})


def _has_ids(reply: Any) -> bool:
    """Whether tokens come with their ids, as those of llama.cpp's server do."""
    content = _content(reply).get("content")
    return bool(content) and all("id" in each for each in content[0].get("top_logprobs") or [{}])
