"""A LoRA's layers as they train on a model in half precision: one operation a layer, forward and backward, in that precision.

The LoRA's weights, their gradients and the optimizer stay float32; the base's weights get no gradient. PEFT's own layers give the
same numbers up to rounding, in four times as many operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_HALF = (torch.bfloat16, torch.float16)


def are_plain(layers: Sequence[Any]) -> bool:
    """Whether these layers of PEFT are one LoRA each, on frozen linear layers in half precision, and nothing beside it."""
    return bool(layers) and all(_is_plain(layer) for layer in layers)


def _is_plain(layer: Any) -> bool:
    base, names = layer.base_layer, layer.active_adapters
    return (
        type(base) is nn.Linear
        and base.weight.dtype in _HALF
        and not base.weight.requires_grad
        and len(names) == 1
        and names[0] in layer.lora_A
        and not layer.lora_variant
        and not layer.merged
        and not layer.disable_adapters
        and not layer.lora_bias[names[0]]
    )


@contextmanager
def at_once(layers: Sequence[Any]) -> Iterator[None]:
    """Inside the block those of these layers that are switched on run as one operation each."""
    acting = [layer for layer in layers if is_acting(layer)]
    for layer in acting:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in acting:
            layer.__dict__.pop("forward", None)


def is_acting(layer: Any) -> bool:
    """Whether a layer with a LoRA is switched on (see `SelectorAdapter.act`)."""
    return layer.__dict__.get("forward") != layer.base_layer.__call__


def _forward(layer: Any, hidden: Tensor) -> Tensor:
    base, [name] = layer.base_layer, layer.active_adapters
    dropout = layer.lora_dropout[name]
    kept = _kept(hidden, dropout.p) if dropout.training and getattr(dropout, "p", 0.0) > 0 else None
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _Lora.apply(hidden, base.weight, base.bias, down, up, layer.scaling[name], kept)  # type: ignore[no-any-return]


def _kept(hidden: Tensor, p: float) -> Tensor:
    """What dropout multiplies by: 0 with probability p (to 15 bits), else 1 / (1 - p).

    On a CPU a draw of 64 bits does for four numbers, and the rest is whole numbers too: one draw each, compared and cast, takes
    longer than the LoRA's products.
    """
    if hidden.device.type != "cpu":
        return torch.empty_like(hidden).bernoulli_(1 - p).div_(1 - p)
    count = hidden.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    scale = int(torch.tensor(1 / (1 - p), dtype=hidden.dtype).view(torch.int16))
    is_dropped_below = round(p * 2**15)
    bits.bitwise_and_(2**15 - 1).neg_().add_(is_dropped_below - 1)  # below 0: kept
    return bits.bitwise_right_shift_(15).bitwise_and_(scale).view(hidden.dtype).view_as(hidden)


class _Lora(torch.autograd.Function):
    """hidden W^T + bias + scaling * (hidden * kept) down^T up^T."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        kept: Tensor | None,
    ) -> Tensor:
        flat = hidden.flatten(0, -2)  # [n, in]
        down, up = down.to(flat.dtype), up.to(flat.dtype)
        read = flat if kept is None else flat * kept.view_as(flat)
        inner = F.linear(read, down)  # [n, r]
        output = F.linear(flat, weight, bias).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(weight, down, up, read, inner, kept)
        ctx.scaling = scaling
        return output.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # type: ignore[override]
        weight, down, up, read, inner, kept = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)  # [n, out]
        to_inner = (grad @ up).mul_(ctx.scaling)  # [n, r]
        to_hidden = None
        if ctx.needs_input_grad[0]:
            to_hidden = grad @ weight
            if kept is None:
                to_hidden.addmm_(to_inner, down)
            else:
                to_hidden.addcmul_(to_inner @ down, kept.view_as(read))
            to_hidden = to_hidden.view(*grads[0].shape[:-1], -1)
        to_down = (to_inner.T @ read).float()
        to_up = (grad.T @ inner).float().mul_(ctx.scaling)
        return to_hidden, None, None, to_down, to_up, None, None
