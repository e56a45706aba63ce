"""What transformers' `generate` asks of a callable: its arguments read, and refused where the loop cannot do what they say."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria

from s2t.methods.sample import Sampling
from s2t.model.engine import Engine

_MIXIN: Any = GenerationMixin
_GENERATE = inspect.unwrap(_MIXIN.generate).__code__
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_HANDLED = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})


def caller_arguments() -> dict[str, Any]:
    """What `generate` was given and does not hand to a callable: transformers 5.23 keeps streamer and assistant to itself.

    A streamer has got the prompt by then; one that is never ended leaves its reader waiting.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    names = ("streamer", "assistant_model", "synced_gpus")
    return {name: frame.f_locals.get(name) for name in names} if frame is not None else {}


def refuse(
    model: Any, input_ids: Tensor, config: Any, model_kwargs: dict[str, Any], caller: dict[str, Any], synced_gpus: bool
) -> None:
    """Raise ValueError, which names it, for anything asked for that the loop cannot do."""
    assistant = caller.get("assistant_model")
    mode = config.get_generation_mode(assistant)
    cache = model_kwargs.get("past_key_values")
    size = input_ids.shape[0]
    asked = {
        "num_beams": config.num_beams > 1 and "use num_beams=1",
        "assistant_model": assistant is not None and "the loop needs none",
        f"generation mode {mode.value}": mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and "use greedy decoding or do_sample",
        "synced_gpus": (synced_gpus or caller.get("synced_gpus")) and "run one process per model",
        "inputs_embeds": model_kwargs.get("inputs_embeds") is not None and "pass input_ids",
        "output_attentions": config.output_attentions and "run the model on the sequences afterwards",
        "output_hidden_states": config.output_hidden_states and "run the model on the sequences afterwards",
        "guidance_scale": config.guidance_scale not in (None, 1, 1.0) and "leave it out",
        "output_scores or output_logits of a batch": wants_scores(config)
        and size > 1
        and "pass one row at a time: rows that end early have no scores",
        "past_key_values": cache is not None and cache.get_seq_length() > 0 and "pass the whole prompt",
        "position_ids": not _are_plain(model_kwargs) and "pass an attention_mask with padding on the left",
        "an encoder": model.config.is_encoder_decoder and "use a decoder-only model",
    }
    if config.do_sample:
        asked["output_scores with do_sample"] = (
            config.return_dict_in_generate and config.output_scores and "ask for output_logits"
        )
        off = {"typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "top_h": (None,)}
        for name, values in off.items():
            asked[name] = getattr(config, name, None) not in values and "use temperature, top_k, top_p or min_p"
    for name, value in model_kwargs.items():
        if name not in _HANDLED and name not in ("inputs_embeds", "cache_position"):
            asked[name] = value is not None and "leave it out"
    for name, advice in asked.items():
        if advice:
            raise ValueError(f"s2t.custom_generate does not support {name}; {advice}, or leave custom_generate out.")


def wants_scores(config: Any) -> bool:
    return bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))


def _are_plain(model_kwargs: dict[str, Any]) -> bool:
    """Whether the positions are those that follow from the mask."""
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None:
        return True
    if mask is None:
        return bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())
    real = mask.bool()
    return positions.shape == mask.shape and bool((positions == mask.long().cumsum(-1) - 1)[real].all())


def prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Every row's ids without padding; raises ValueError for an empty one."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    prompts = [row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True)]
    if not all(prompts):
        raise ValueError(f"row {prompts.index([])} of input_ids is empty or masked altogether; give it a token.")
    return prompts


def eos_ids(criteria: StoppingCriteriaList) -> frozenset[int] | None:
    """The ids that end a row, as the criteria have them; None where there are none."""
    found: list[Any] = [item.eos_token_id for item in criteria if hasattr(item, "eos_token_id")]
    if not found:
        return None
    return frozenset(int(i) for ids in found for i in torch.as_tensor(ids).flatten().tolist())


def pad_id(config: Any) -> int:
    """What finished rows are filled with: the pad token, else the first end token, as transformers has it."""
    eos = config.eos_token_id
    first = eos[0] if isinstance(eos, (list, tuple)) else eos
    return int(config.pad_token_id if config.pad_token_id is not None else first if first is not None else 0)


def max_length(criteria: StoppingCriteriaList) -> int:
    lengths = [item.max_length for item in criteria if isinstance(item, MaxLengthCriteria)]
    if not lengths:
        raise ValueError("s2t.custom_generate needs a length limit; pass max_new_tokens.")
    return min(lengths)


def sampling(config: Any) -> Sampling | None:
    """Filters of `do_sample`; they act where a token is drawn, and leave candidates and triggers alone."""
    if not config.do_sample:
        return None

    def given(value: Any, off: float) -> Any:
        return off if value is None else value

    return Sampling(
        temperature=given(config.temperature, 1.0),
        top_p=given(config.top_p, 1.0),
        top_k=given(config.top_k, 0),
        min_p=given(config.min_p, 0.0),
    )


def is_done_already(processor: Any, engine: Engine, config: Any) -> bool:
    """Whether the loop does what this processor would: sampling filters, and keeping reserved ids out."""
    if isinstance(processor, SuppressTokensLogitsProcessor):
        forbidden = {*engine.forbidden_ids.tolist(), *_reserved(engine)}
        return not wants_scores(config) and set(processor.suppress_tokens.tolist()) <= forbidden
    return bool(config.do_sample) and isinstance(processor, _WARPERS)


def _reserved(engine: Engine) -> tuple[int, ...]:
    return (engine.adapter.reserved if engine.adapter is not None else engine.loaded.reserved).all


def own(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Ordinary tensors, free of inference mode."""
    return tuple(tensor.clone() for tensor in tensors)
