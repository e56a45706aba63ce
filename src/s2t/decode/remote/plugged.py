"""S2T-LOCAL on a server that runs `s2t`'s logits processor: what is asked of it, and whether it is there.

A request then writes until a trigger where another candidate might win, with nothing listed on the way; one more request
holds a row for each candidate that might, and goes on from the winner. Under readout `rank` it writes on through its triggers,
and a row under the LoRA, on the prefix of one, names the winner there. See `core.insampler` for what the server does.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from s2t.core.onserver import AT, GROUP, RANKED, READING, ROOM, ROWS, WARMUP, SelectorSettings, Told, ranges, read
from s2t.decode.remote.client import Client
from s2t.decode.remote.selector import ServedSelector
from s2t.decode.remote.wire import BadReply, Completion, CompletionRequest, parse_rows
from s2t.errors import RemoteError
from s2t.methods.strategies import Strategy

_PROBE = (5, 6, 7, 8)


@dataclass(frozen=True, slots=True)
class Plugged:
    """How one run asks; `max_length` is the longest prompt and reply that the server takes, if it says so."""

    reading: SelectorSettings
    max_length: int | None = None
    lora: str | None = None
    """What the rows of readout `rank` are asked of."""

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
        if not _is_pluggable(served) or strategy.trigger.name not in ("criticality", "random"):
            return None
        threshold = strategy.threshold if strategy.trigger.name == "criticality" else None
        try:
            reading = _reading(served, threshold, strategy.num_candidates, stops, forbidden)
            return cls(reading, max_length, served.lora)
        except ValueError:
            return None

    def room(self, length: int, most: int) -> int:
        """Tokens of text to ask for behind a prompt of this length; below 1 where the server could not answer."""
        if self.max_length is None:
            return most
        return min(most, self.max_length - length - self.reading.num_extra(most) - 1)

    def request(
        self,
        ids: Sequence[int],
        room: int,
        warmup: int,
        at: Sequence[int],
        key: str,
        num_rows: int = 1,
        name: str | None = None,
    ) -> CompletionRequest:
        """Go on behind `ids`; with more rows than one, from the best of so many candidates.

        Under readout `rank` the candidates of triggers are kept under `name`.
        """
        args: dict[str, Any] = {READING: self.reading.to_json(), ROOM: room, WARMUP: warmup}
        if at:
            args[AT] = list(at)
        if name is not None:
            args[GROUP] = name

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

    def ranked(self, ids: Sequence[int], name: str, place: int, key: str) -> CompletionRequest:
        """Rank the candidates of a step of the text of this name under the adapter; `ids` is what the step follows."""
        return CompletionRequest(
            ids,
            max_tokens=1 + self.reading.num_extra(1),
            model=self.lora,
            key=key,
            extra={
                "stop_token_ids": list(self.reading.marks),
                "ignore_eos": True,
                "vllm_xargs": {READING: self.reading.to_json(), ROOM: 1, GROUP: name, RANKED: place},
            },
        )

    def told(self, done: Completion, room: int) -> Told:
        """What one row's reply says."""
        return read(done.token_ids, self.reading, room)


def _reading(
    served: ServedSelector, threshold: float | None, num_candidates: int, stops: Sequence[int], forbidden: Sequence[int]
) -> SelectorSettings:
    return SelectorSettings(
        served.bins,
        served.yes_no,
        threshold,
        served.temperature,
        served.prior_weight,
        num_candidates,
        tuple(sorted(stops)),
        ranges(forbidden),
        served.scale,
        served.config.adapter_weight,
        served.ranks,
    )


def _is_pluggable(served: ServedSelector) -> bool:
    """Bins that are read under a LoRA are not: a row of the base has none."""
    return served.ranks or served.lora is None


async def has_plugin(client: Client, model: str, served: ServedSelector, forbidden: Sequence[int]) -> bool:
    """Whether every server chooses between two candidates as the plug-in does; one that cannot be reached counts as able."""
    if not _is_pluggable(served):
        return False
    try:
        plugged = Plugged(_reading(served, None, 2, (), forbidden), lora=served.lora)
    except ValueError:
        return False

    async def told(url: str, request: CompletionRequest) -> list[Told]:
        reply = await client.try_once(url, request.body(model))
        rows = parse_rows(reply, request) if reply is not None else []
        return [found for found in (plugged.told(done, 2) for done in rows) if not found.is_lost]

    async def chooses(url: str) -> bool:
        if not served.ranks:
            return len(await told(url, plugged.request(_PROBE, 2, 0, (), "", num_rows=2))) == 1
        name = uuid.uuid4().hex
        text = await told(url, plugged.request(_PROBE, 2, 0, (0,), "", name=name))
        return bool(text and text[0].passed and await told(url, plugged.ranked(_PROBE, name, 0, "")))

    for server in client.servers.all:
        try:
            if not await chooses(server.url):
                return False
        except RemoteError:
            continue
        except BadReply:
            return False
    return True
