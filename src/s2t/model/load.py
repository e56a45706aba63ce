"""Model and tokenizer from a hub id, a folder, or the embedded pair; checks that two models can work as a pair.

Weights load from safetensors only and remote code stays off unless asked for. Every failure is one line.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from s2t.errors import ModelError
from s2t.model.cache import check_cacheable
from s2t.model.chat import stop_ids
from s2t.model.merged import MergedConfig, local_folder, open_merged
from s2t.model.reserved import ReservedIds, choose_reserved_ids
from s2t.model.tiny import embedded_path, is_embedded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with its tokenizer; `vocab_size` counts real tokens, padding rows excluded."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: frozenset[int]
    execution: str = "auto"  # of its engines: auto, eager, static or compile
    merged: MergedConfig | None = None  # of a folder that `s2t merge` wrote

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def num_params(self) -> int:
        return sum(p.numel() for name, p in self.model.named_parameters() if "lora_" not in name)

    @cached_property
    def fingerprint(self) -> str:
        if self.merged is not None and self.merged.scope == "candidates":
            return str(
                self.merged.adapter["base_fingerprint"]
            )  # the base's weights, whatever dtype they were merged in
        return fingerprint(self.model)

    @cached_property
    def reserved(self) -> ReservedIds:
        """The reserved ids of this tokenizer for 16 bins; never generated, with or without an adapter."""
        if self.merged is not None and self.merged.scope == "always":
            return self.merged.reserved
        return self.reserved_for(16)

    def reserved_for(self, num_bins: int) -> ReservedIds:
        """The reserved ids for any number of bins."""
        head: Any = self.model.get_output_embeddings()
        rows = int(head.weight.shape[0])
        return choose_reserved_ids(self.tokenizer.get_vocab(), rows, num_bins)


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    execution: str = "auto",
) -> LoadedModel:
    """Load `name` for inference, in eval mode, with SDPA attention where the model has it.

    `execution` is how the engines of this model run their steps: auto, eager, static or compile.

    Raises ModelError, one line, when the model is missing, gated, has no safetensors weights, needs remote
    code, or has a cache that cannot be branched; and when a merged folder is damaged.
    """
    place = torch.device(pick_device(device))
    source = str(embedded_path(name)) if is_embedded(name) else local_folder(name)
    merged = open_merged(source)
    kind = "auto" if dtype == "float16" else _DTYPES.get(dtype, "auto")
    options = {"trust_remote_code": trust_remote_code}
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=kind, use_safetensors=True, **options)
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(_why_not_loaded(name, error)) from error
    identity = fingerprint(model)  # before float16, which cannot hold every bfloat16 value
    if dtype == "float16":
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
    loaded = replace(wrap_model(name, model.to(place), tokenizer, merged), execution=execution)
    if merged is None or merged.scope == "always":
        loaded.__dict__["fingerprint"] = identity
    return loaded


def wrap_model(
    name: str, model: Any, tokenizer: PreTrainedTokenizerBase, merged: MergedConfig | None = None
) -> LoadedModel:
    """A model already in memory (of a merged folder, perhaps) as a LoadedModel; checks that its cache can be branched."""
    check_cacheable(model.config)
    if getattr(model, "_is_stateful", False):
        raise ModelError(
            f"{model.config.model_type} carries a state instead of a cache that can be branched or cropped; "
            "use a model with plain attention layers."
        )
    takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    if not takes_positions or getattr(model.config, "alibi", False):
        raise ModelError(
            f"{model.config.model_type} takes no position ids (its attention is biased by distance), so "
            "candidates cannot share a position; use a model with rotary or learned positions."
        )
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    vocab_size = min(max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0])
    if merged is not None:
        vocab_size = min(vocab_size, merged.vocab_size)
    return LoadedModel(name, model.eval(), tokenizer, vocab_size, stop_ids(tokenizer, eos), merged=merged)


def pick_device(device: str) -> str:
    """Resolve `auto`; raises ModelError for a device this torch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for but this torch sees no GPU; use --device cpu.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ModelError(f"device {device} is none that this torch can use; try auto, cpu or cuda.") from error
    return device


def check_pair(slm: LoadedModel, llm: LoadedModel) -> None:
    """Raise ModelError unless both tokenizers give every token the same id; padding rows may differ in number."""
    left, right = slm.tokenizer.get_vocab(), llm.tokenizer.get_vocab()
    if left == right:
        return
    differing = sorted(token for token in left.keys() | right.keys() if left.get(token) != right.get(token))
    raise ModelError(
        f"{slm.name} and {llm.name} have different tokenizers ({len(differing)} tokens differ, first {differing[0]!r}); "
        "choose two models of one family."
    )


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


def _why_not_loaded(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"model {name} needs its own code; review it, then pass --trust-remote-code."
    if "gated" in text or "401" in text or "403" in text:
        return f"model {name} is gated or private; accept its terms on the hub, then run: hf auth login."
    if "safetensors" in text and Path(name).exists():
        return f"model {name} has no safetensors weights; convert it first (pickled weights are not loaded)."
    if not Path(name).exists() and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        return f"model folder {name} does not exist; pass an existing folder or a hub id such as Qwen/Qwen2.5-0.5B-Instruct."
    if Path(name).exists() or "/" in name or "Connection" in text:
        return f"model {name} cannot be loaded: {text[:200]}"
    return f"model {name} was not found: give a hub id (owner/name), a folder, or tiny:slm / tiny:llm."


class quiet:
    """Silence progress bars and warnings of transformers and the hub while loading; restores them after."""

    def __enter__(self) -> None:
        self.hub_verbosity = hub_logging.get_verbosity()
        hub_logging.set_verbosity_error()
        self.verbosity = transformers_logging.get_verbosity()
        self.bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        hub_logging.set_verbosity(self.hub_verbosity)
        transformers_logging.set_verbosity(self.verbosity)
        if self.bars:
            transformers_logging.enable_progress_bar()
