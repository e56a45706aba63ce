"""The output embedding of a model: hidden states to logits, of the whole vocabulary or of a few tokens. Knows no cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head:
    """Last hidden states to logits exactly as the model's own forward does, for chosen positions only."""

    def __init__(self, model: nn.Module) -> None:
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr]
        self.linear = model.get_output_embeddings()  # type: ignore[operator]
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.divisor = float(getattr(config, "logits_scaling", None) or 1.0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V], float32."""
        return self._scaled(self.linear(hidden).float())

    def own(self, hidden: Tensor) -> Tensor:
        """As a call, but in the model's own dtype where that says the same; casting takes longer than most of what is read."""
        logits = self.linear(hidden)
        return logits if self.scale == self.divisor and not self.softcap else self._scaled(logits.float())

    def at(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of a few tokens of each state, without those of the others; [n, H], [n, K] -> [n, K], float32."""
        weight, bias = self.linear.weight, getattr(self.linear, "bias", None)
        if not weight.is_floating_point() or weight.shape[-1] != hidden.shape[-1]:  # packed by a quantizer
            return self(hidden).gather(-1, ids)
        logits = torch.einsum("nh,nkh->nk", hidden.float(), weight[ids].float())
        return self._scaled(logits if bias is None else logits + bias[ids].float())

    def _scaled(self, logits: Tensor) -> Tensor:
        if self.scale != self.divisor:
            logits = logits * (self.scale / self.divisor)
        if self.softcap:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits
