"""A loaded model and what is known of it: its output embedding, what tokens cost on it, its reserved ids, whose weights it has.

`model.load` makes one. Its engine is asked for here, so that nothing above has to know which kind it is.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from s2t.model.merged import MergedConfig
from s2t.model.reserved import ReservedIds, choose_reserved_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # with 120 MiB of model classes, which llama.cpp does without

    from s2t.model.adapter import SelectorReader
    from s2t.model.engine import Engine


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with its tokenizer; `vocab_size` counts real tokens, padding rows excluded.

    What is known of its weights is kept, so its layers are not to be changed for others; `replace` makes one that knows none.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: frozenset[int]
    execution: str = "auto"  # of its engines: auto, eager, static or compile
    merged: MergedConfig | None = None  # of a folder that `s2t merge` wrote
    most_rows: ClassVar[int] = sys.maxsize
    """Rows that an engine of it writes at once, at most."""
    states_hold_logits: ClassVar[bool] = False
    """Whether the states that its engine returns have the logits behind them."""

    def open_engine(self, max_rows: int, adapter: SelectorReader | None = None) -> Engine:
        """An engine of so many rows, of the kind that the model was loaded for."""
        from s2t.model.engine import Engine

        return Engine(self, max_rows, adapter)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int | None:
        """Tokens that it can read; None where it has no limit.

        Of positions scaled by `longrope` only those before the scale changes: which of its two scales a forward takes depends
        on the longest row in it, so that rows would not be independent of each other.
        """
        text = self.model.config.get_text_config(decoder=True)
        longest = getattr(text, "max_position_embeddings", None) or None
        rope: Any = getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return rope.get("original_max_position_embeddings") or longest
        return longest

    @property
    def facts(self) -> dict[str, Any]:
        """What runs it: the engine, how its weights are kept, what it can read, and the memory of its weights."""
        return self.facts_at(self.context_length)

    def facts_at(self, length: int | None) -> dict[str, Any]:
        """As `facts`, where prompt and answer have so many tokens together at most."""
        weights = {id(parameter): parameter for parameter in self.model.parameters()}.values()
        return {
            "engine": "torch",
            "quantization": str(self.model.dtype).removeprefix("torch."),
            "context_length": length,
            "weights_bytes": sum(parameter.numel() * parameter.element_size() for parameter in weights),
        }

    @cached_property
    def head(self) -> Head:
        """Hidden states to logits."""
        return Head(self.model)

    @cached_property
    def flops(self) -> FlopCount:
        """What running tokens through it costs."""
        return FlopCount(self.model, self.model.config.get_text_config(decoder=True))

    @cached_property
    def num_params(self) -> int:
        return count_params(self.model)

    @cached_property
    def fingerprint(self) -> str:
        if self.merged is not None and self.merged.scope != "always":
            return str(self.merged.adapter["base_fingerprint"])  # whatever dtype the base's weights were merged in
        return fingerprint(self.model)

    @cached_property
    def reserved(self) -> ReservedIds:
        """The reserved ids of this tokenizer for 16 bins; never generated, with or without an adapter."""
        if self.merged is not None and self.merged.scope not in ("step", "candidates"):
            return self.merged.reserved
        return self.reserved_for(16)

    def reserved_for(self, num_bins: int) -> ReservedIds:
        """The reserved ids for any number of bins."""
        head: Any = self.model.get_output_embeddings()
        rows = int(head.weight.shape[0])
        return choose_reserved_ids(self.tokenizer.get_vocab(), rows, num_bins)


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


def count_params(model: nn.Module) -> int:
    """Values of all weights, LoRA left out; a weight packed by bitsandbytes counts what it unpacks to."""
    total = 0
    for name, parameter in model.named_parameters():
        packed: Any = getattr(parameter, "quant_state", None)
        if "lora_" not in name:
            total += parameter.numel() if packed is None else packed.shape.numel()
    return total


def fingerprint(model: nn.Module) -> str:
    """Identity of a base model's weights, 16 hex digits, the same for every load dtype.

    Hashes each parameter's name, shape and up to 512 evenly spaced values rounded to bfloat16; LoRA
    weights are left out, so an adapted model keeps its base's fingerprint.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(model.named_parameters(), key=lambda item: _plain_name(item[0])):
        if "lora_" in name:
            continue
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // 512) | 1  # odd, so that it does not fall on one column of a wide matrix
        flat = flat[::step][:512].to("cpu", torch.bfloat16)
        digest.update(f"{_plain_name(name)}{tuple(parameter.shape)}".encode())
        digest.update(flat.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _plain_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
