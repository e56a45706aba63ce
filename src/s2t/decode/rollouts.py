"""Answers that go on from somewhere inside another one: what a token decides is seen by where the text ends up."""

from __future__ import annotations

from collections.abc import Sequence

from s2t.decode.pair import Pair
from s2t.methods.strategies import Strategy
from s2t.model.chat import decode_ids
from s2t.records import Request


def continued(
    pair: Pair,
    strategy: Strategy,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    limit: int,
) -> list[list[int]]:
    """Answers of at most `limit` tokens that begin with some prefixes and are ended by a strategy; the n-th has key n.

    A prefix that is over already, by its length or a stop id, stays as it is.
    """
    is_open = [len(p) < limit and not (p and p[-1] in pair.stop_ids) for p in prefixes]
    requests = [
        Request(i, [*prompts[i], *prefixes[i]], str(i), max_new_tokens=limit - len(prefixes[i]))
        for i in range(len(prefixes))
        if is_open[i]
    ]
    done = iter(pair.write(strategy, requests, limit) if requests else [])
    return [[*p, *next(done).token_ids] if goes_on else list(p) for p, goes_on in zip(prefixes, is_open, strict=True)]


def text_of(pair: Pair, ids: Sequence[int]) -> str:
    """The text of an answer's ids, in the SLM's tokens, without what ended it."""
    return decode_ids(pair.slm.tokenizer, [i for i in ids if i not in pair.stop_ids])
