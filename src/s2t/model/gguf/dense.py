"""The torch engine's way to a GGUF file: transformers unpacks every weight into an ordinary model. Needs gguf and accelerate."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerBase

from s2t.errors import ModelError
from s2t.model.gguf.file import Header
from s2t.model.gguf.tokenizer import load_tokenizer, stop_ids_of

EXTRA = "pip install 's2t[gguf]'"


def load_dense(
    header: Header, dtype: torch.dtype | None, place: torch.device | None, device_map: str | None
) -> tuple[PreTrainedTokenizerBase, Any]:
    """Tokenizer and model of a GGUF file, its weights unpacked to a dtype (None: their own, or bfloat16 where they are packed).

    Raises ModelError, one line, where a package is missing or the file lacks tensors; else what transformers raises.
    """
    lacking = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if lacking:
        raise ModelError(
            f"{header.path} is a GGUF file, and reading it needs the package {' and '.join(lacking)}; {EXTRA}."
        )
    folder, file = str(header.path.parent), header.path.name
    with _quick_reader():
        read: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            quantization_config=GgufConfig(gguf_file=file, dequantize=True),
            dtype=dtype or getattr(torch, header.dtype),
            output_loading_info=True,
            **({"device_map": device_map} if device_map is not None else {}),
        )
    model, found = read
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"GGUF file {header.path} is damaged: {missing[0]} is missing from its weights.")
    model.hf_quantizer, model.is_quantized = None, False  # nothing is packed any more
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config.eos_token_id = stop_ids_of(header) or None
    return load_tokenizer(header), model if place is None else model.to(place)


@contextmanager
def _quick_reader() -> Iterator[None]:
    """Within it transformers reads GGUF files without taking their vocabularies apart, string by string, several times.

    The package's reader makes an array of each of 300,000 strings, which takes longer than the weights; what is asked of
    them here is how many there are. Its bar is left out, too.
    """
    import gguf

    class Quick(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            start = int(orig_offs)
            data: Any = self.data
            is_array = raw_type == gguf.GGUFValueType.ARRAY
            if not is_array or struct.unpack_from("<I", data, start)[0] != gguf.GGUFValueType.STRING:
                return super()._get_field_parts(orig_offs, raw_type)
            count, at = struct.unpack_from("<Q", data, start + 4)[0], start + 12
            for _ in range(count):
                at += 8 + struct.unpack_from("<Q", data, at)[0]
            types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
            return at - start, [data[:0]], [0] * count, types  # as many empty strings

    with patch("gguf.GGUFReader", Quick), patch("transformers.modeling_gguf_pytorch_utils.tqdm", _no_bar):
        yield


def _no_bar(items: Any, **_: Any) -> Any:
    return items
