"""S2T-LOCAL on a server that runs `s2t`'s logits processor: what is asked of it, and whether it is there.

A request then writes until a trigger where another candidate might win, with nothing listed on the way; one more request
holds a row for each candidate that might, and goes on from the winner. See `core.insampler` for what the server does.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2t.core.onserver import AT, GROUP, READING, ROOM, ROWS, WARMUP, Reading, Told, ranges, read
from s2t.decode.remote.client import Client
from s2t.decode.remote.selector import ServedSelector
from s2t.decode.remote.wire import BadReply, Completion, CompletionRequest, parse_rows
from s2t.decode.strategies import Strategy
from s2t.errors import RemoteError

_PROBE = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Plugged:
    """How one run asks; `max_length` is the longest prompt and reply that the server takes, if it says so."""

    reading: Reading
    max_length: int | None = None

    @classmethod
    def of(
        cls,
        served: ServedSelector,
        strategy: Strategy,
        stops: Sequence[int],
        forbidden: Sequence[int],
        max_length: int | None = None,
    ) -> Plugged | None:
        """None where the server must not, or there are too few reserved ids to tell anything in."""
        if served.lora is not None or strategy.trigger.name not in ("criticality", "random"):
            return None
        threshold = strategy.threshold if strategy.trigger.name == "criticality" else None
        try:
            return cls(_reading(served, threshold, strategy.num_candidates, stops, forbidden), max_length)
        except ValueError:
            return None

    def room(self, length: int, most: int) -> int:
        """Tokens of text to ask for behind a prompt of this length; below 1 where the server could not answer."""
        if self.max_length is None:
            return most
        return min(most, self.max_length - length - self.reading.num_extra(most) - 1)

    def request(
        self, ids: Sequence[int], room: int, warmup: int, at: Sequence[int], key: str, num_rows: int = 1
    ) -> CompletionRequest:
        """Go on behind `ids`; with more rows than one, from the best of so many candidates."""
        args: dict[str, Any] = {READING: self.reading.to_json(), ROOM: room, WARMUP: warmup}
        if at:
            args[AT] = list(at)

        def named() -> dict[str, Any]:  # rows of a broken attempt may still wait under its name
            return {"vllm_xargs": args | ({GROUP: uuid.uuid4().hex, ROWS: num_rows} if num_rows > 1 else {})}

        return CompletionRequest(
            ids,
            max_tokens=room + self.reading.num_extra(room),
            more_prompts=[ids] * (num_rows - 1),
            key=key,
            extra={"stop_token_ids": list(self.reading.marks), "ignore_eos": True},
            fresh=named,
        )

    def told(self, done: Completion, room: int) -> Told:
        """What one row's reply says."""
        return read(done.token_ids, self.reading, room)


def _reading(
    served: ServedSelector, threshold: float | None, num_candidates: int, stops: Sequence[int], forbidden: Sequence[int]
) -> Reading:
    return Reading(
        served.bins,
        served.yes_no,
        threshold,
        served.config.score_temperature,
        served.config.prior_weight,
        num_candidates,
        tuple(sorted(stops)),
        ranges(forbidden),
        served.scale,
    )


async def has_plugin(client: Client, model: str, served: ServedSelector, forbidden: Sequence[int]) -> bool:
    """Whether every server chooses between two candidates as the plug-in does; one that cannot be reached counts as able."""
    if served.lora is not None:
        return False
    try:
        plugged = Plugged(_reading(served, None, 2, (), forbidden))
    except ValueError:
        return False
    request = plugged.request(_PROBE, 2, 0, (), "", num_rows=2)
    for server in client.servers.all:
        try:
            reply = await client.try_once(server.url, request.body(model))
            rows = [plugged.told(done, 2) for done in parse_rows(reply, request)] if reply is not None else []
        except RemoteError:
            continue
        except BadReply:
            return False
        if [row.is_lost for row in rows].count(False) != 1:
            return False
    return True
