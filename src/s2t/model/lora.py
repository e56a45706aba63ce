"""A plain PEFT adapter (one that somebody trained, not a selector) found by its folder or hub id, and merged into its base.

Everything above sees an ordinary model. Weights load from safetensors only. Knows nothing of how a base is loaded.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from s2t.errors import ModelError, missing_extra
from s2t.files import read_json

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
SELECTOR_CONFIG = "s2t_config.json"


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
    try:
        from peft import PeftModel
    except ImportError as error:
        raise missing_extra("peft", "train") from error
    try:
        with safe_open(lora.folder / PEFT_WEIGHTS, framework="pt"):  # its header and length, before PEFT reads it
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(model, str(lora.folder)).merge_and_unload()
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"adapter {lora.name} cannot be merged into {lora.base}: {text}") from error
    for parameter in merged.parameters():
        parameter.requires_grad_(False)
    return merged


def _fetched(name: str, revision: str | None) -> Path | None:
    """The cached snapshot of an adapter on the hub, with its weights if it has any; None where `name` is none."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
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
