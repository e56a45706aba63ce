"""A PEFT LoRA as the GGUF file that llama.cpp reads: names and the order of rotary rows are changed, numbers are not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from s2t.errors import ModelError
from s2t.files import read_json
from s2t.model.gguf.file import Header


class Sizes(Protocol):
    """What has an architecture and its sizes: a header, or a config."""

    @property
    def architecture(self) -> str: ...

    def of_model(self, key: str, default: Any = None) -> Any: ...


ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Whose tensors llama.cpp has one by one as Hugging Face has them, but for `rotated`."""
_WEIGHTS = "adapter_model.safetensors"
_UNKNOWN = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")


def write_lora(folder: Path, header: Header, path: Path) -> None:
    """Write the LoRA of an adapter folder for the base model of a GGUF file, in half precision unless that is in float32.

    Raises ModelError, one line, for a kind of LoRA or of model that cannot be converted, or a base of another shape.
    """
    import gguf

    config = read_json(folder / "adapter_config.json")
    if given := [key for key in _UNKNOWN if config.get(key)]:
        raise ModelError(f"adapter {folder} has {given[0]}, which llama.cpp does not read; pass --engine torch.")
    check_architecture(header)
    names = gguf.get_tensor_name_map(_number(header.architecture), header.of_model("block_count"))
    kind: Any = np.float32 if header.dtype == "float32" else np.float16
    writer = gguf.GGUFWriter(path, header.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    rank = int(config["r"])
    scale = math.sqrt(rank) if config.get("use_rslora") else 1.0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]) * scale)
    for name, values in _tensors(folder).items():
        module, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        target = names.get_name(module)
        if target is None or f"{target}.weight" not in header.shapes:
            raise ModelError(f"adapter {folder} changes {module}, which {header.path} does not have; use its own base.")
        own = rotated(values, target, header) if part == "lora_B" else values
        _check_shape(folder, header, f"{target}.weight", part, own)
        writer.add_tensor(f"{target}.weight.{part.lower()}", np.ascontiguousarray(own.astype(kind)))
    finish(writer)


def check_architecture(header: Header) -> None:
    """Raise ModelError for an architecture whose tensors are not converted here."""
    if header.architecture not in ARCHITECTURES:
        raise ModelError(
            f"{header.path} is of architecture {header.architecture}, and adapters are converted for "
            f"{', '.join(ARCHITECTURES)}; pass --engine torch."
        )


def rotated(values: np.ndarray, target: str, header: Sizes) -> np.ndarray:
    """Rows of a query or key projection in llama.cpp's rotary order, which differs for the architecture llama alone."""
    if header.architecture != "llama" or not target.endswith(("attn_q", "attn_k")):
        return values
    heads = header.of_model("attention.head_count")
    if target.endswith("attn_k"):
        heads = header.of_model("attention.head_count_kv", heads)
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def finish(writer: Any) -> None:
    """Write everything that was added to a GGUF writer, and close its file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _number(architecture: str) -> Any:
    import gguf

    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError, TypeError) as error:
        raise ModelError(f"adapter {folder} is damaged: {' '.join(str(error).split())[:200]}.") from error


def _check_shape(folder: Path, header: Header, name: str, part: str, values: np.ndarray) -> None:
    rows, columns = header.shapes[name]
    got, expected = (values.shape[1], columns) if part == "lora_A" else (values.shape[0], rows)
    if got != expected:
        raise ModelError(
            f"adapter {folder} was trained on another base model: {name} of {header.path} has {expected} where it has {got}."
        )
