"""A plain PEFT adapter (one that somebody trained, not a selector): found by its folder or hub id and merged into its base,
or new on a model, and saved.

Everything above sees an ordinary model. Weights load from safetensors only. Knows nothing of how a base is loaded.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers.utils.hub import cached_file

from s2t.errors import ModelError, S2TError, missing_extra
from s2t.files import read_json, write_bytes, write_json, write_text
from s2t.hub import offline_unless_it_answers
from s2t.model.checkpoint import kind_faults, tensor_kinds
from s2t.model.half_lora import are_plain, at_once

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
SELECTOR_CONFIG = "s2t_config.json"
DISTILL_CONFIG = "s2t_distill.json"


@dataclass(frozen=True, slots=True)
class Lora:
    """Where an adapter lies on this machine, the base it names, and whether it brings a tokenizer."""

    name: str
    folder: Path
    base: str
    base_revision: str | None
    has_tokenizer: bool


def find_lora(name: str, revision: str | None = None) -> Lora | None:
    """The adapter that `name` (a folder or hub id) is, or None for a model.

    Raises ModelError for a selector adapter, one without safetensors weights, and one that names no base.
    """
    path = Path(name)
    folder = path if path.is_dir() else _fetched(name, revision)
    if folder is None or not (folder / PEFT_CONFIG).is_file():
        return None
    if (folder / SELECTOR_CONFIG).is_file():
        base = read_json(folder / SELECTOR_CONFIG).get("base_model", "BASE")
        raise ModelError(f"{name} is a selector adapter, not a model; pass --slm {base} --adapter {name}.")
    if path.is_dir() and (folder / "config.json").is_file():
        raise ModelError(
            f"{name} holds a model and an adapter ({PEFT_CONFIG}); move the adapter into a folder of its own."
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ModelError(
            f"adapter {name} has no {PEFT_WEIGHTS}; save it again as safetensors (pickles are not loaded)."
        )
    return _described(name, folder)


def merge_lora(model: Any, lora: Lora) -> Any:
    """The base with the adapter added to its weights, and no trace of PEFT; raises ModelError for what cannot be merged."""
    peft = import_peft()
    try:
        kinds = tensor_kinds(lora.folder / PEFT_WEIGHTS)  # the header and length, before PEFT reads it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, str(lora.folder))
            _check_adapter(lora, set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)), kinds)
            _untie(adapted.get_base_model())
            merged = adapted.merge_and_unload()
    except S2TError:
        raise
    except Exception as error:  # the boundary to PEFT and to what its files say
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"adapter {lora.name} cannot be merged into {lora.base}: {text}") from error
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged


def _check_adapter(lora: Lora, expected: set[str], kinds: Mapping[str, str]) -> None:
    """Raise ModelError unless the file holds every tensor of the adapter, and none beside; PEFT makes up what is missing."""
    faults = [f"{key} is missing from {PEFT_WEIGHTS}" for key in sorted(expected - kinds.keys())]
    extra = sorted(key for key in kinds.keys() - expected if "lora_" in key)  # embeddings may lie beside them
    faults += [f"{key} belongs to no layer of {lora.base}" for key in extra]
    if faults := faults + kind_faults(kinds.items()):
        raise ModelError(f"adapter {lora.name} is damaged: {faults[0]}; get it again.")


def _untie(model: Any) -> None:
    """Give the output embedding weights of its own where the adapter changes one of two tied embeddings.

    Merged into shared weights the change would be in both, which is another model than the one that was trained.
    """
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    source, target = _plain(inner), _plain(outer)
    if (source is inner and target is outer) or source.weight is not target.weight:
        return
    target.weight = type(target.weight)(target.weight.detach().clone(), requires_grad=False)
    for config in {id(part): part for part in (model.config, model.config.get_text_config(decoder=True))}.values():
        config.tie_word_embeddings = False


def _plain(layer: Any) -> Any:
    """The layer of the base model that PEFT has wrapped, or the layer itself."""
    for name in ("base_layer", "original_module"):
        if (inside := getattr(layer, name, None)) is not None:
            return _plain(inside)
    return layer


def lora_base(folder: str | Path) -> str | None:
    """The base model that an adapter in a folder of this machine names; None for anything else."""
    path = Path(folder) / PEFT_CONFIG
    if not os.path.isfile(path):
        return None
    config = read_json(path)
    return config.get("base_model_name_or_path") if isinstance(config, dict) else None


def distilled_from(folder: str | Path) -> dict[str, Any] | None:
    """What `s2t distill` wrote of an adapter in a folder of this machine: method, task, held-out templates; else None."""
    path = Path(folder) / DISTILL_CONFIG
    return read_json(path) if os.path.isfile(path) else None


def new_lora(model: Any, rank: int, alpha: float, dropout: float) -> Any:
    """A PEFT model: a fresh LoRA on all linear layers but the output embedding, in eval mode; zero as it starts."""
    peft = import_peft()
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with quiet_peft():
        return peft.get_peft_model(model, config).eval()  # training turns dropout on


@contextmanager
def trained_in_half(model: Any, layers: Sequence[Any] | None = None) -> Iterator[None]:
    """Forwards inside the block that have gradients run a LoRA's products in the model's own half precision, as everybody trains.

    Its weights, their gradients and the optimizer stay float32. PEFT alone would cast whole activations to float32. `layers` are
    the model's `tuner_layers`, which take a while to find.
    """
    dtype = model.dtype
    if dtype not in (torch.bfloat16, torch.float16) or not torch.is_grad_enabled():
        yield
        return
    if layers is None:
        layers = tuner_layers(model)
    if are_plain(layers):
        with at_once(layers):
            yield
        return
    from peft.helpers import disable_input_dtype_casting

    with disable_input_dtype_casting(model), torch.autocast(model.device.type, dtype=dtype):
        yield


def tuner_layers(model: Any) -> list[Any]:
    """The layers with a LoRA, ours or PEFT's."""
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def lora_parameters(model: Any) -> dict[str, Any]:
    """The LoRA's weights among a model's parameters, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def save_lora(
    peft_model: Any,
    folder: str | Path,
    base: str,
    revision: str | None,
    texts: Mapping[str, str],
    weights: Mapping[str, Any],
) -> None:
    """Write a PEFT adapter of `base`, and further files by name; its config goes last, so a half-written folder is none.

    `weights` are those of `lora_parameters`.
    """
    folder = Path(folder)
    named = {f"base_model.model.{name}": value for name, value in weights.items()}
    state = import_peft().get_peft_model_state_dict(peft_model, state_dict=named)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    write_bytes(folder / PEFT_WEIGHTS, save(tensors, metadata={"format": "pt"}))
    for name, text in texts.items():
        write_text(folder / name, text)
    [config] = peft_model.peft_config.values()
    named = {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    write_json(folder / PEFT_CONFIG, config.to_dict() | named)


def import_peft() -> Any:
    """The package; MissingExtraError, one line, where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise missing_extra("peft", "train") from error
    return peft


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep to itself what PEFT's use of a renamed transformers property would print."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def _fetched(name: str, revision: str | None) -> Path | None:
    """The cached snapshot of an adapter on the hub, with its weights if it has any; None where `name` is none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    with offline_unless_it_answers():
        config = cached_file(name, PEFT_CONFIG, revision=revision, **quiet)
        if config is None:
            return None
        for file in (PEFT_WEIGHTS, SELECTOR_CONFIG, "tokenizer_config.json"):
            cached_file(name, file, revision=revision, **quiet)
    return Path(config).parent


def _described(name: str, folder: Path) -> Lora:
    config = read_json(folder / PEFT_CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not base:
        raise ModelError(f"adapter {name} names no base model; set base_model_name_or_path in its {PEFT_CONFIG}.")
    return Lora(name, folder, base, config.get("revision"), (folder / "tokenizer_config.json").is_file())
