"""What explains an adapter's weights: its settings as `s2t_config.json`, read and checked without loading a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from s2t import __version__
from s2t.errors import ModelError
from s2t.files import read_json
from s2t.model.merged import CONFIG_FILE, adapter_folder, is_merged, sha256
from s2t.model.metadata import check_kinds, is_same_source

_TUPLES = ("heldout_templates", "reserved_ids")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter was trained on and how it is read; `s2t_config.json`."""

    base_model: str
    base_fingerprint: str
    llm: str | None = None
    task: str | None = None
    """Several are separated by semicolons."""
    readout: str = "bins"
    """rank (the SLM's own next-token logits under the LoRA) or bins (reserved ids behind every candidate)."""
    scope: str = "candidates"
    num_candidates: int = 8
    num_bins: int = 16
    score_temperature: float = 0.1
    prior_weight: float = 1.0
    adapter_weight: float = 1.0
    """The weight of the adapter's reading in the score, in [0, 1], as the held-out groups of training set it; 0 is greedy."""
    criticality: str = "head"
    head_size: int = 64
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    thresholds: dict[str, float] = field(default_factory=dict)
    """Per trigger name, in the trigger's own unit."""
    trigger_rate: float | None = None
    warmup_steps: int = 3
    split_hashes: dict[str, str] = field(default_factory=dict)
    """Digest of the sorted problem hashes of each split that was used."""
    heldout_templates: tuple[str, ...] = ()
    heldout_by_task: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Where it was trained on several tasks: the templates held out of each; those above are in none of them."""
    reserved_ids: tuple[int, ...] = ()
    """Ids of the R bins in order, then of yes and no; never generated. Set when it is saved."""
    weights: dict[str, str] = field(default_factory=dict)
    """sha256 of the folder's weights files, by name."""
    versions: dict[str, str] = field(default_factory=dict)
    s2t_version: str = __version__

    def was_trained_on(self, task: str) -> bool:
        """Whether a task is among those of the selector's training; its options do not count."""
        return self.task is None or any(is_same_source(name, task) for name in self.task.split(";"))

    def heldout_of(self, task: str) -> tuple[str, ...]:
        """The templates of a task that were held out of the selector's training; none of a task it was not trained on."""
        if not self.was_trained_on(task):
            return ()
        alike = (name for name in (task, *self.heldout_by_task) if is_same_source(name, task))
        return next(
            (self.heldout_by_task[name] for name in alike if name in self.heldout_by_task), self.heldout_templates
        )


def _what_it_is(folder: Path) -> str:
    """Why a path is no adapter folder, in words."""
    if not os.path.exists(folder):
        return f"adapter {str(folder)[:200]} does not exist"
    if (folder / "adapter" / CONFIG_FILE).is_file():
        return f"{folder} is a run, its adapter is {folder / 'adapter'}"
    return f"{folder} is no adapter folder: {CONFIG_FILE} is missing"


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """The metadata of an adapter, a folder or a hub id; raises ModelError where it is none."""
    folder = adapter_folder(folder)
    path = folder / CONFIG_FILE
    if not os.path.isfile(path):  # a name that no file can have is none, too
        raise ModelError(f"{_what_it_is(folder)}; pass the folder `s2t train` wrote.")
    if is_merged(folder):
        raise ModelError(f"{folder} is a merged model, not an adapter; pass --slm {folder} without --adapter.")
    data = read_json(path)
    if not isinstance(data, dict) or not {"base_model", "base_fingerprint"} <= data.keys():
        raise ModelError(f"adapter {folder} is damaged: {CONFIG_FILE} names no base_model; train it again.")
    known = {item.name for item in fields(AdapterConfig)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ModelError(f"{path} has unknown keys {', '.join(unknown)}; it was written by a newer s2t; upgrade.")
    return adapter_config(data)


def adapter_config(data: dict[str, Any]) -> AdapterConfig:
    """The metadata from what was written; raises ModelError, one line, for a value of another kind."""
    try:
        check_kinds(data, AdapterConfig("", ""))
        values: dict[str, Any] = {**data, **{name: tuple(data.get(name, ())) for name in _TUPLES}}
        values["heldout_by_task"] = {task: tuple(held) for task, held in data.get("heldout_by_task", {}).items()}
        return AdapterConfig(**values)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{CONFIG_FILE} of an adapter is damaged: {error}; copy the folder again.") from error


def check_weights(folder: Path, weights: Mapping[str, str]) -> None:
    """Raise ModelError unless the weights files are those that were saved (older adapters have no hashes)."""
    for name, digest in weights.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ModelError(
                f"adapter {folder} is damaged: {name} is not the file that was saved; copy the folder again, or train again."
            )
