"""GGUF files of small models, written here: the embedded pair's, and random ones of several families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model
from s2t.model.loaded import LoadedModel

_SETTINGS: dict[str, Any] = {
    "head_size": 8,
    "lora_rank": 4,
    "lora_dropout": 0.0,
    "thresholds": {"criticality": 0.5},
    "prior_weight": 0.05,
}


def _adapter(loaded: LoadedModel, scope: str = "step", lora: float = 1.0, **changes: Any) -> SelectorAdapter:
    readout = {"step": "rank", "candidates": "bins", "always": "bins"}[scope]
    config = AdapterConfig(
        loaded.name,
        loaded.fingerprint,
        readout=readout,
        scope=scope,
        **_SETTINGS | changes,
    )
    torch.manual_seed(7)
    adapter = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0.0, lora) if lora else parameter.zero_()
            elif name.startswith("selector."):
                parameter.normal_(0.0, 0.3)
    return adapter


@pytest.fixture(scope="session")
def save_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a random adapter of a model by name (or of one in memory), which acts strongly; its folder."""

    def make(model: str | LoadedModel = "tiny:slm", scope: str = "step", **changes: Any) -> Path:
        loaded = load_model(model) if isinstance(model, str) else model
        folder = tmp_path_factory.mktemp("adapter")
        adapter = _adapter(loaded, scope, **changes)
        adapter.save(folder)
        adapter.detach()
        return folder

    return make


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The GGUF file of a model by name (or of one in memory), in float32; written once."""
    pytest.importorskip("gguf", reason="gguf is not installed: pip install s2t[dev]")
    from s2t.model.gguf.write import write_gguf

    made: dict[str, Path] = {}

    def write(model: str | LoadedModel = "tiny:slm") -> Path:
        loaded = load_model(model) if isinstance(model, str) else model
        if loaded.name not in made:
            made[loaded.name] = tmp_path_factory.mktemp("gguf") / f"{loaded.name.replace(':', '-')}.gguf"
            write_gguf(loaded, made[loaded.name])
        return made[loaded.name]

    return write
