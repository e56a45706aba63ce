"""Models of real shapes with random weights: speed needs no checkpoint. `random:qwen2.5-0.5b`, `random:qwen2.5-1.5b,layers=4`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from s2t.errors import ConfigError
from s2t.model.load import load_model, pick_device, wrap_model
from s2t.model.loaded import LoadedModel
from s2t.model.tiny import embedded_path

PREFIX = "random:"
_COMMON = {
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {  # hidden, intermediate, layers, heads, key-value heads, rows, tied
    name: dict(
        zip(
            (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
                "tie_word_embeddings",
            ),
            sizes,
            strict=True,
        )
    )
    for name, sizes in {
        "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936, True),
        "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936, True),
        "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064, False),
        "qwen2.5-14b": (5120, 13824, 48, 40, 8, 152064, False),
        "qwen2.5-32b": (5120, 27648, 64, 40, 8, 152064, False),
    }.items()
}
_REAL_TOKENS = 151643  # of Qwen2.5's vocabulary; the rows past them are padding


def open_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    execution: str = "auto",
    seed: int = 0,
    **of_checkpoints: Any,
) -> LoadedModel:
    """A checkpoint, or a random model by its shape; raises ConfigError for a shape that is not known.

    `of_checkpoints` are the settings of `load_model` that a random model has no use for.
    """
    if not name.startswith(PREFIX):
        return load_model(name, dtype, device, trust_remote_code, execution, **of_checkpoints)
    if given := sorted(key for key, value in of_checkpoints.items() if value is not None):
        raise ConfigError(f"{', '.join(given)} is of checkpoints; {name} has random weights.")
    shape, _, rest = name.removeprefix(PREFIX).partition(",")
    if shape not in SHAPES:
        raise ConfigError(f"shape {shape!r} is unknown; expected one of {', '.join(SHAPES)}.")
    sizes = _COMMON | SHAPES[shape]
    if rest:
        key, _, value = rest.partition("=")
        if key != "layers" or not value.isdigit() or int(value) < 1:
            raise ConfigError(f"after the shape only layers=N is understood; got {rest!r}.")
        sizes["num_hidden_layers"] = int(value)
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, "bfloat16" if dtype == "auto" else dtype))
    try:
        with torch.device(pick_device(device)):
            model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    finally:
        torch.set_default_dtype(before)
    tokenizer = AutoTokenizer.from_pretrained(str(embedded_path("tiny:slm")))
    return replace(wrap_model(name, model, tokenizer), vocab_size=_REAL_TOKENS, execution=execution)
