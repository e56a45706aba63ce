"""What running tokens through a model costs, by its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from s2t.model.load import count_params


@dataclass(slots=True)
class Work:
    """What one row cost so far on one model; forwards count once per row and call."""

    forwards: int = 0
    processed: int = 0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forwards + other.forwards, self.processed + other.processed, self.flops + other.flops)


class FlopCount:
    """2 x parameters x tokens (input embedding left out, output embedding in) + 4 x layers x width x attended tokens."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        total = count_params(model)
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        tied = embedding is model.get_output_embeddings().weight  # type: ignore[operator]
        self.per_token = 2.0 * (total if tied else total - embedding.numel())
        self.per_attended = 4.0 * config.num_hidden_layers * config.hidden_size

    def __call__(self, width: int, context: float) -> float:
        return width * (self.per_token + self.per_attended * context)
