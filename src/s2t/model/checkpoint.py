"""Whether the weights of a checkpoint are those of the model that its config describes, and whether that model runs at all.

Libraries fill what is missing with random numbers, cast what is of another kind and leave the rest aside, in silence; here
each of these is one line. Knows names, shapes and kinds of tensors, not what they are for.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from s2t.errors import DataError, ModelError
from s2t.files import read_json

_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
_SIZES = (
    *(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("head_dim", "max_position_embeddings", "sliding_window"),
)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def check_complete(name: str, model: Any, found: Mapping[str, Any], source: str, revision: str | None = None) -> None:
    """Raise ModelError unless every tensor of the model was read, in its own shape and kind, and no part of it was left over.

    `found` is the loading info of transformers; `source` the folder or hub id that was read. A tensor of another module (a
    value head, say) may be left over. Of quantized weights the kinds are the quantizer's business, and of a model with code of
    its own that code's.
    """
    if faults := sorted(_shape_faults(found)):
        raise ModelError(_damaged(name, faults))
    if getattr(model, "hf_quantizer", None) is not None:
        return
    known = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    extra = found["unexpected_keys"]
    faults = [f"{key} is in its weights and not in its config" for key in sorted(extra) if _belongs(key, model)]
    own_code = not type(model).__module__.startswith("transformers.")
    faults += (
        []
        if own_code
        else kind_faults(
            (key, kind)
            for path in _weight_files(source, revision)
            for key, kind in tensor_kinds(path).items()
            if key not in extra and (key in known or key.endswith(".weight"))
        )
    )
    if faults:
        raise ModelError(_damaged(name, faults))


def check_config(name: str, config: Any) -> None:
    """Raise ModelError where a size in a model's config is none, as far as a model could be made of it all the same."""
    text = config.get_text_config(decoder=True)
    has_windows = "sliding_attention" in (getattr(text, "layer_types", None) or ["sliding_attention"])
    for key in _SIZES:
        value = getattr(text, key, None)
        if key == "sliding_window" and value == 0 and not has_windows:
            continue  # how transformers says that a Qwen2-MoE uses none
        if value is not None and not (type(value) is int and value > 0):
            raise ModelError(f"model {name}: {key} in config.json must be a whole number above 0; got {value!r}.")
    rope: Any = getattr(text, "rope_parameters", None) or {}
    theta = rope.get("rope_theta", getattr(text, "rope_theta", None))
    if theta is not None and not (isinstance(theta, (int, float)) and theta > 0):
        raise ModelError(f"model {name}: rope_theta in config.json must be a number above 0; got {theta!r}.")


def check_generation_config(source: str, revision: str | None = None) -> None:
    """Raise ModelError for a generation_config.json that cannot be read; transformers would go on without its end of text."""
    path = _found(source, GENERATION_CONFIG_NAME, revision)
    if path is None:
        return
    try:
        found = read_json(path)
    except DataError as error:
        raise ModelError(str(error)) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold one JSON object; got {type(found).__name__}; get the model again.")
    check_ids(f"eos_token_id in {path}", found.get("eos_token_id"))


def check_ids(name: str, value: Any) -> list[int]:
    """The token ids of a setting: one, several, or none (null); raises ModelError for anything else."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if wrong := [i for i in ids if type(i) is not int]:
        raise ModelError(f"{name} must be a token id, a whole number, or a list of these; got {wrong[0]!r}.")
    return ids


@torch.inference_mode()
def check_runs(name: str, model: Any) -> None:
    """Raise ModelError unless the model gives finite logits for two tokens."""
    ids = torch.tensor([[0, min(1, model.get_input_embeddings().weight.shape[0] - 1)]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise not_finite(name)


def not_finite(name: str) -> ModelError:
    """The error for a model whose logits are NaN or infinite."""
    return ModelError(
        f"model {name} gives logits that are not finite (NaN or infinity); its weights are damaged, or do not fit "
        "--dtype: try --dtype float32."
    )


def tensor_kinds(path: str | Path) -> dict[str, str]:
    """The dtype of every tensor in a safetensors file, as the file calls it (F32, I64, ...); reads the header alone."""
    with safe_open(path, framework="pt") as file:
        return {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118


def kind_faults(kinds: Iterable[tuple[str, str]]) -> list[str]:
    """What is wrong with the dtypes of weights: one that holds no floating-point numbers, or others than in the other layers.

    Tensors of one checkpoint may be of several kinds (norms in float32, say), those that layers have alike may not.
    """
    faults, of_layers = [], defaultdict(Counter)
    for key, kind in (pairs := list(kinds)):
        if kind not in _FLOATS:
            faults.append(f"{key} holds {kind} numbers, not floating-point ones")
        of_layers[_NUMBER.sub("*", key)][kind] += 1
    for key, kind in pairs:
        usual = of_layers[_NUMBER.sub("*", key)].most_common(1)[0][0]
        if kind != usual:
            faults.append(f"{key} holds {kind} numbers, and that of other layers {usual}")
    return faults


def _shape_faults(found: Mapping[str, Any]) -> Iterator[str]:
    for key in found["missing_keys"]:
        yield f"{key} is missing from its weights"
    for key, got, expected in found["mismatched_keys"]:
        yield f"{key} is of shape {list(got)} in its weights and {list(expected)} by its config"
    yield from (" ".join(str(line).split())[:200] for line in found["error_msgs"])


def _damaged(name: str, faults: list[str]) -> str:
    more = f" (and {len(faults) - 1} more like it)" if len(faults) > 1 else ""
    return f"model {name} is damaged: {faults[0]}{more}; get it again, or mend its config.json."


def _belongs(key: str, model: nn.Module) -> bool:
    """Whether a tensor that was left over is one of the model's: of a further layer, or of a layer that should not have it."""
    owners = {_NUMBER.sub("*", path) for path, module in model.named_modules() if not any(module.children())}
    prefix = getattr(model, "base_model_prefix", "")
    owner = _NUMBER.sub("*", key.rpartition(".")[0])
    return bool(owner) and (owner in owners or f"{prefix}.{owner}" in owners)


def _weight_files(source: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder, or of a hub id that was just read; [] where they are under other names."""
    index = _found(source, SAFE_WEIGHTS_INDEX_NAME, revision)
    if index is None:
        single = _found(source, SAFE_WEIGHTS_NAME, revision)
        return [] if single is None else [single]
    names = sorted(set(read_json(index)["weight_map"].values()))
    return [path for path in (_found(source, name, revision) for name in names) if path is not None]


def _found(source: str, name: str, revision: str | None) -> Path | None:
    if os.path.isdir(source):
        path = Path(source, name)
        return path if path.is_file() else None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(source, name, revision=revision, local_files_only=True, **quiet)
    return None if found is None else Path(found)
