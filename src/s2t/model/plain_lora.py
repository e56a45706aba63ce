"""A plain LoRA on linear layers, for inference without PEFT, whose import takes as long as that of torch.

Layers, names and numbers are PEFT's, bit for bit; whatever else an adapter_config.json asks for, and training, is left to PEFT.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from s2t.files import read_json, write_bytes, write_json

NAME = "default"  # PEFT's, of an adapter without a name
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
# What may stand in adapter_config.json of a plain LoRA; anything else that is set is for PEFT.
# fmt: off
_PLAIN = frozenset((
    "auto_mapping", "base_model_name_or_path", "bias", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
    "runtime_config", "target_modules", "task_type",
))
# fmt: on


class PlainLora(nn.Module):
    """A linear layer and what a LoRA adds to it: base(x) + scaling B A x, the addition in the LoRA's own dtype."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({NAME: _linear(down.float().to(base.weight.device))})
        self.lora_B = nn.ModuleDict({NAME: _linear(up.float().to(base.weight.device))})
        self.scaling = {NAME: scaling}
        self.active_adapters = [NAME]

    def forward(self, hidden: Tensor) -> Tensor:
        result = self.base_layer(hidden)
        down, up = self.lora_A[NAME], self.lora_B[NAME]
        return (result + up(down(hidden.to(down.weight.dtype))) * self.scaling[NAME]).to(result.dtype)  # type: ignore[operator]


class PlainModel:
    """A base model with such layers in place of its own; as much of a PeftModel as inference needs."""

    def __init__(self, model: nn.Module, layers: Mapping[str, PlainLora], config: dict[str, Any]) -> None:
        self.model, self.layers, self.config = model, layers, config
        for name, layer in layers.items():
            _put(model, name, layer)

    def get_base_model(self) -> nn.Module:
        """The model that was given."""
        return self.model

    def save_pretrained(
        self, folder: str, safe_serialization: bool = True, *, state_dict: Mapping[str, Tensor]
    ) -> None:
        """Write the folder that PEFT would write."""
        tensors = {
            name.replace(f".{NAME}.", "."): value.detach().cpu().contiguous() for name, value in state_dict.items()
        }
        write_bytes(Path(folder) / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_json(Path(folder) / CONFIG, self.config)

    def unload(self) -> nn.Module:
        """Give the model its own layers back."""
        for name, layer in self.layers.items():
            _put(self.model, name, layer.base_layer)
        return self.model


def attach_plain(model: nn.Module, folder: Path) -> PlainModel | None:
    """Attach the LoRA of an adapter folder, or None where only PEFT can.

    Raises ValueError where tensors belong to no layer of the model or do not fit it; the model is then as it was.
    """
    config = read_json(folder / CONFIG)
    if not _is_plain(config):
        return None
    pairs: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(folder / WEIGHTS).items():
        name, _, side = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        pairs[name][side] = value
    modules = dict(model.named_modules())
    found: dict[str, PlainLora] = {}
    for name, pair in pairs.items():
        base = modules.get(name)
        if base is not None and type(base) is not nn.Linear:  # quantized, or another LoRA's
            return None
        if base is None or set(pair) != {"lora_A", "lora_B"}:
            raise ValueError(f"{name} of the adapter is no layer of the model, or lacks one of its two tensors")
        down, up = pair["lora_A"], pair["lora_B"]
        if (up.shape[0], down.shape[1], up.shape[1]) != (base.out_features, base.in_features, down.shape[0]):
            raise ValueError(f"size mismatch for {name}: {tuple(up.shape)} and {tuple(down.shape)}")
        found[name] = PlainLora(base, down, up, config["lora_alpha"] / config["r"])
    return PlainModel(model, found, config)


def _is_plain(config: Any) -> bool:
    others = {key for key, value in config.items() if value and key not in _PLAIN}
    return not others and config.get("peft_type") == "LORA" and config.get("bias", "none") == "none"


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
