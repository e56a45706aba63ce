"""A small head over the SLM's state that foretells an answer: whether it ends right, together with how many tokens are left."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2t.model.small import check_states, read_settings, read_weights, save_network

EDGES = (8, 16, 32, 64, 128, 256, 512)
"""Remaining tokens from which the next bin of lengths begins."""


@dataclass(frozen=True)
class ForecastConfig:
    """What a head reads, and the mean number of remaining tokens in each of its L bins."""

    slm: str
    hidden_size: int
    lengths: tuple[float, ...]
    width: int = 64


class ForecastHead(nn.Module):
    """One hidden layer over the layer-normed state; 2 L logits out, wrong answers first. Zeros at first: all is as likely."""

    def __init__(self, config: ForecastConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        last = nn.Linear(config.width, 2 * len(config.lengths))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, config.width), nn.GELU(), last)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, H] -> [n, 2 L], logits of (right, bin of remaining length)."""
        return self.layers(hidden.float())

    @torch.inference_mode()
    def read(self, hidden: Tensor) -> Tensor:
        """Joint probabilities of being wrong or right and of each bin; [n, H] -> [n, 2, L]."""
        check_states(hidden, self.config, "forecast")
        return self.to(hidden.device)(hidden).softmax(-1).unflatten(-1, (2, -1))


def length_bin(tokens: int) -> int:
    """The bin of so many remaining tokens."""
    return bisect_right(EDGES, tokens)


def save_forecast(head: ForecastHead, folder: Path) -> None:
    """Write the forecast's folder."""
    save_network(head, folder, "forecast")


def load_forecast(folder: str | Path) -> ForecastHead:
    """The head of a folder; raises ModelError where there is none."""
    found = read_settings(folder, "forecast", "s2t train-router --method zip-rc")
    found["lengths"] = tuple(found["lengths"])
    head = ForecastHead(ForecastConfig(**found))
    read_weights(head, folder, "forecast")
    return head
