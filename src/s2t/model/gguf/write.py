"""A model in memory as a GGUF file, and a GGUF file packed to fewer bits; for llama.cpp's plain dense architectures.

For `s2t export` where no GGUF file of the base model is at hand, and for tests. Other architectures convert with llama.cpp's own
scripts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2t.errors import ModelError
from s2t.model.gguf.file import read_header
from s2t.model.gguf.library import last_error, llama
from s2t.model.gguf.lora import finish, rotated
from s2t.model.gguf.tokenizer import WHOLE, name_of_pre_tokenizer
from s2t.model.loaded import LoadedModel

QUANTIZATIONS = {
    **{"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_0": 8, "q4_k_m": 15},
    **{"q4_k_s": 14, "q4_0": 2, "q3_k_m": 12, "q2_k": 10},
}
"""Those of `s2t export`, and llama.cpp's numbers for them."""
_ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_F32 = 0


def write_gguf(loaded: LoadedModel, path: Path) -> None:
    """Write a loaded model, weights in float32, with its tokenizer and chat template.

    Raises ModelError, one line, for an architecture or a tokenizer that is not converted here.
    """
    import gguf

    config = loaded.model.config
    architecture = _architecture(loaded)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(loaded.name).name)
    writer.add_file_type(_F32)
    _add_sizes(writer, config)
    _add_tokenizer(writer, loaded)
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    order = _Order(architecture, config)
    for name, values in _tensors(loaded).items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _cannot(loaded, f"it has a tensor {name}")
        array = values.detach().float().cpu().numpy()
        writer.add_tensor(target, np.ascontiguousarray(rotated(array, target.rsplit(".", 1)[0], order)))
    finish(writer)


def pack(source: Path, target: Path, quantization: str) -> None:
    """Write a GGUF file with its weights packed; raises ModelError where llama.cpp does not."""
    api = llama()
    params = api.llama_model_quantize_default_params()
    params.ftype = QUANTIZATIONS[quantization]
    params.allow_requantize = False
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise ModelError(f"{source} cannot be packed to {quantization}: {last_error() or 'llama.cpp gives no reason'}.")
    read_header(target)


class _Order:
    """What `rotated` asks of a header, from a config."""

    def __init__(self, architecture: str, config: Any) -> None:
        self.architecture, self._config = architecture, config

    def of_model(self, key: str, default: Any = None) -> Any:
        names = {"attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads"}
        return getattr(self._config, names[key], default)


def _architecture(loaded: LoadedModel) -> str:
    config: Any = loaded.model.config
    if config.model_type not in _ARCHITECTURES:
        raise _cannot(loaded, f"it is of type {config.model_type}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise _cannot(loaded, f"its rotary positions are scaled ({rope['rope_type']})")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise _cannot(loaded, "its attention has a sliding window")
    return _ARCHITECTURES[config.model_type]


def _cannot(loaded: LoadedModel, why: str) -> ModelError:
    return ModelError(
        f"{loaded.name} is not converted here, since {why}; convert it with llama.cpp's convert_hf_to_gguf.py, or take a GGUF "
        "file of it from the hub, and pass it as --base-gguf."
    )


def _add_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", getattr(config, "rope_theta", 10000.0))))
    writer.add_vocab_size(config.vocab_size)


def _tensors(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """Parameters by name, under any LoRA; without the output embedding where it is the input embedding."""
    model: Any = loaded.model
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    plain = {
        name.replace(".base_layer.", "."): value for name, value in model.named_parameters() if "lora_" not in name
    }
    return {name: value for name, value in plain.items() if not (is_tied and name == "lm_head.weight")}


def _add_tokenizer(writer: Any, loaded: LoadedModel) -> None:
    """Byte-level BPE. Where llama.cpp knows no such pre-tokenizer the file carries the whole tokenizer, which s2t goes by."""
    tokenizer: Any = loaded.tokenizer
    text = tokenizer.backend_tokenizer.to_str()
    data = json.loads(text)
    if data["model"]["type"] != "BPE" or (data.get("decoder") or {}).get("type") != "ByteLevel":
        raise _cannot(loaded, "its tokenizer is no byte-level BPE")
    name = name_of_pre_tokenizer(tokenizer.backend_tokenizer)
    if name is None:
        writer.add_string(WHOLE, text)
    model: Any = loaded.model
    rows = model.get_input_embeddings().weight.shape[0]
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {i: token.special for i, token in tokenizer.added_tokens_decoder.items()}
    kinds = {True: _CONTROL, False: _USER_DEFINED}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name or "gpt-2")
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types(
        [_UNUSED if i not in by_id else kinds[added[i]] if i in added else _NORMAL for i in range(rows)]
    )
    merges = data["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special(writer, loaded, data)


def _add_special(writer: Any, loaded: LoadedModel, data: dict[str, Any]) -> None:
    tokenizer: Any = loaded.tokenizer
    ids = {"eos": tokenizer.eos_token_id, "bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id}
    for name, i in ids.items():
        if i is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    ends = sorted(loaded.stop_ids - {tokenizer.eos_token_id})
    if ends:
        writer.add_eot_token_id(ends[0])
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and tokenizer("a").input_ids[:1] == [bos])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
