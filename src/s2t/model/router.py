"""The router's network and its folder: an MLP over hidden state, token embedding and the 100 largest logits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from s2t.model.small import check_states, read_settings, read_weights, save_network

NUM_LOGITS = 100


@dataclass(frozen=True)
class RouterConfig:
    """What a router reads, and where it fires unless told otherwise."""

    slm: str
    hidden_size: int
    num_logits: int = NUM_LOGITS
    width: int = 64
    threshold: float = 0.5


class Router(nn.Module):
    """Two hidden layers over layer-normed inputs, one logit out."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        size = 2 * config.hidden_size + config.num_logits
        self.layers = nn.Sequential(
            *(nn.LayerNorm(size), nn.Linear(size, config.width), nn.GELU()),
            *(nn.Linear(config.width, config.width), nn.GELU(), nn.Linear(config.width, 1)),
        )

    def forward(self, features: Tensor) -> Tensor:
        """[n, F] -> [n], the logit of parting."""
        return self.layers(features).squeeze(-1)

    @torch.inference_mode()
    def read(self, hidden: Tensor, embeddings: Tensor, logits: Tensor) -> Tensor:
        """Probability of parting from [n, H], [n, H] and [n, V]; [n]. Raises ModelError for another model's states."""
        check_states(hidden, self.config, "router")
        return self.to(hidden.device)(features(hidden, embeddings, logits, self.config.num_logits)).sigmoid()


def features(hidden: Tensor, embeddings: Tensor, logits: Tensor, num_logits: int = NUM_LOGITS) -> Tensor:
    """What a router reads of n places; [n, H], [n, H], [n, V] -> [n, 2 H + num_logits], float32."""
    top = logits.topk(min(num_logits, logits.shape[-1])).values.clamp_min(-1e4)
    top = nn.functional.pad(top - top[:, :1], (0, num_logits - top.shape[-1]), value=-1e4)
    return torch.cat([hidden.float(), embeddings.float(), top.clamp_min(-50.0)], dim=-1)


def save_router(router: Router, folder: Path) -> None:
    """Write the router's folder."""
    save_network(router, folder, "router")


def load_router(folder: str | Path) -> Router:
    """The router of a folder; raises ModelError where there is none."""
    found = read_settings(folder, "router", "s2t train-router")
    router = Router(RouterConfig(**found))
    read_weights(router, folder, "router")
    return router
