"""Small networks over the SLM's states, a router or a forecast: their folder, and the check that states are of their SLM."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from s2t.errors import ModelError
from s2t.files import read_json, write_bytes, write_json


def save_network(network: Any, folder: Path, name: str) -> None:
    """Write weights first, settings (its `config`) last: a folder with settings is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    write_bytes(folder / f"{name}.safetensors", save(weights))
    write_json(folder / f"{name}.json", asdict(network.config))


def read_settings(folder: str | Path, name: str, command: str) -> dict[str, Any]:
    """The settings of a folder that `command` writes; raises ModelError where there are none."""
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        raise ModelError(f"{folder} holds no {path.name}; pass a folder written by `{command}`.")
    return read_json(path)


def read_weights(network: nn.Module, folder: str | Path, name: str) -> None:
    """Put the folder's weights into a network, frozen."""
    network.load_state_dict(load_file(Path(folder) / f"{name}.safetensors"))
    network.eval().requires_grad_(False)


def check_states(hidden: Tensor, config: Any, name: str) -> None:
    """Raise ModelError where states [n, H] are not of the SLM that a network was trained on."""
    if hidden.shape[-1] != config.hidden_size:
        raise ModelError(
            f"the {name} is of {config.slm}, whose states have {config.hidden_size} numbers; these have {hidden.shape[-1]}; "
            f"pass the --{name} of this SLM."
        )
