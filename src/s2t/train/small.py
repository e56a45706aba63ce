"""Small networks over the SLM's states: how answers are read for them, many at once, and how they are fitted."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2t.config import RouterConfig
from s2t.model.engine import Engine
from s2t.model.loaded import LoadedModel

_TOKENS_AT_ONCE = 2**14
_ROWS, _LEARNING_RATE = 256, 1e-3
_TRAINERS = {"r2r": ("s2t.train.router", "train_router"), "zip-rc": ("s2t.train.forecast", "train_forecast")}


def train(config: RouterConfig) -> dict[str, Any]:
    """Train the network of a method, r2r or zip-rc; returns router-run.json."""
    module, name = _TRAINERS[config.method]
    return getattr(importlib.import_module(module), name)(config)


@torch.inference_mode()
def states_of(slm: LoadedModel, answers: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Tensor]:
    """The states that every token of some answers (prompt, tokens) is predicted from, in order; [T, H] each."""
    for part in _parts(answers):
        engine = Engine(slm, len(part))
        fed = [[*prompt, *tokens[:-1]] for prompt, tokens in part]
        yield from engine.read(range(len(part)), fed, [len(tokens) for _, tokens in part])


def _parts(
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> Iterator[list[tuple[Sequence[int], Sequence[int]]]]:
    """Answers cut, in order, where they would be too many tokens for one forward."""
    part: list[tuple[Sequence[int], Sequence[int]]] = []
    count = 0
    for prompt, tokens in answers:
        size = len(prompt) + len(tokens)
        if part and count + size > _TOKENS_AT_ONCE:
            yield part
            part, count = [], 0
        part.append((prompt, tokens))
        count += size
    if part:
        yield part


def fit(
    network: nn.Module, loss: Callable[[Tensor], Tensor], size: int, num_steps: int, rng: np.random.Generator
) -> None:
    """Train on `size` examples, of which `loss` gives that of some, by index; leaves the network frozen."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    for _ in range(num_steps):
        batch = torch.from_numpy(rng.integers(0, size, size=min(_ROWS, size)))
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
