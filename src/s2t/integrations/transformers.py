"""transformers' `generate` with this package's loop inside: `model.generate(**inputs, custom_generate=s2t.custom_generate(...))`.

transformers prepares inputs, processors and stopping criteria; the loop runs on the caller's own model and gives back what
`generate` gives back. An adapter is attached once and sleeps between calls, so that plain `generate` stays as it was. What
the loop cannot do raises ValueError; nothing is ignored.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationMixin, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from s2t.config import DecodeConfig, build_config
from s2t.decode.loop import Decoder, Request
from s2t.decode.workload import read_thresholds
from s2t.errors import ConfigError, ModelError
from s2t.methods.sample import Sampling
from s2t.methods.strategies import Strategy, build_strategy
from s2t.model.adapter import SelectorAdapter, SelectorReader, attached_adapter, load_selector
from s2t.model.engine import Engine
from s2t.model.load import LoadedModel, wrap_model
from s2t.model.merged import CONFIG_FILE, is_merged, local_folder, open_merged

STRATEGIES = ("greedy", "s2t-local")
SETTINGS = ("trigger", "threshold", "calibration", "num_candidates", "warmup_steps")
_BOUND = "_s2t_bound"
_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
_MIXIN: Any = GenerationMixin
_GENERATE = inspect.unwrap(_MIXIN.generate).__code__
_HANDLED = frozenset({"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"})


def custom_generate(
    adapter: str | Path | None = None,
    strategy: str | None = None,
    *,
    tokenizer: Any = None,
    seed: int | None = None,
    execution: str = "auto",
    **settings: Any,
) -> CustomGenerate:
    """A decoding loop for `model.generate(**inputs, custom_generate=...)`; the model is the caller's own.

    `adapter` was written by `s2t train` (a folder or a hub id); a model loaded from a merged folder needs none. `strategy` is
    `s2t-local` where there is either, else `greedy`. `tokenizer` is the model's (loaded from where the model came from
    unless given), `seed` that of sampling and of the random trigger (drawn from torch's unless given), `execution` as in
    `s2t.load`. Settings: trigger, threshold, calibration, num_candidates, warmup_steps, as in DecodeConfig.

    Raises ConfigError for settings that are unknown or out of range.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)} in custom_generate; got {strategy!r}.")
    if unknown := sorted(settings.keys() - set(SETTINGS)):
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(SETTINGS)}.")
    config = build_config(DecodeConfig, flags=settings)
    config.check_decode()
    return CustomGenerate(adapter, strategy, tokenizer, seed, execution, config)


def generate_merged(model: Any, **arguments: Any) -> Any:
    """What a merged folder's `custom_generate/generate.py` runs; takes the arguments of `generate` and of `custom_generate`.

    The model must have been loaded from the merged folder: transformers does not say which folder the code came from.
    """
    if not _is_of_merged(model):
        raise ModelError(
            f"this model was loaded from {model.name_or_path}, which is nothing `s2t merge` wrote; load "
            "it from the merged folder, or pass custom_generate=s2t.custom_generate(adapter=FOLDER)."
        )
    own = {name: arguments.pop(name) for name in ("strategy", "seed", "execution", *SETTINGS) if name in arguments}
    tokenizer = arguments.pop("tokenizer", None)
    stops = arguments.pop("stop_strings", None)
    if stops is not None:  # transformers hands no tokenizer on to callables, so that the criterion is made here
        found = tokenizer if tokenizer is not None else _tokenizer(model.name_or_path)
        criteria = StoppingCriteriaList([StopStringCriteria(found, stops)])
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, *(arguments.get("stopping_criteria") or ())])
    loop = custom_generate(tokenizer=tokenizer, **own)
    return _MIXIN.generate(model, custom_generate=loop, **arguments)  # model.generate may be this function


def detach(model: Any) -> None:
    """Take an adapter that `custom_generate` attached off the model again, e.g. before saving it."""
    bound = model.__dict__.pop(_BOUND, None)
    if bound is not None and isinstance(bound.reader, SelectorAdapter):
        bound.reader.detach()


@dataclass(frozen=True)
class CustomGenerate:
    """The callable that `generate` runs; made by `custom_generate`."""

    adapter: str | Path | None
    strategy: str | None
    tokenizer: Any
    seed: int | None
    execution: str
    config: DecodeConfig

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Decode a left-padded batch [B, P]; returns [B, P + new], padded, or GenerateDecoderOnlyOutput."""
        caller = _caller_arguments()
        streamer = streamer if streamer is not None else caller.get("streamer")
        _refuse(model, input_ids, generation_config, model_kwargs, caller, synced_gpus)
        with _as_it_was(model):
            bound = _bind(model, self.adapter, self.tokenizer)
            prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
            call = _Call(
                self, bound, prompts, input_ids, logits_processor, stopping_criteria, generation_config, streamer
            )
            return call.run()

    def plan(self, reader: SelectorReader | None, sampling: Sampling | None) -> Strategy:
        """The strategy of one call; raises ConfigError where it lacks an adapter or a threshold."""
        name = self.strategy or ("greedy" if reader is None else "s2t-local")
        if name == "s2t-local" and reader is None:
            raise ConfigError(
                "strategy s2t-local needs an adapter; pass s2t.custom_generate(adapter=FOLDER), or load a merged folder."
            )
        trained = reader.config if reader is not None and name == "s2t-local" else None
        thresholds = read_thresholds(self.config.calibration) | (trained.thresholds if trained is not None else {})
        k = trained.num_candidates if trained is not None else None
        strategy = build_strategy(name, self.config, thresholds, k)
        is_random = strategy.trigger.is_random
        if sampling is not None and is_random:
            raise ValueError("trigger random draws the numbers that do_sample needs; use do_sample=False with it.")
        seed = self.seed or 0
        if self.seed is None and (sampling is not None or is_random):
            seed = int(torch.randint(2**31, ()).item())  # follows torch.manual_seed
        return replace(strategy, sampling=sampling, seed=seed)


class _Call:
    """One call of the loop, from prompts to what `generate` returns."""

    def __init__(
        self,
        settings: CustomGenerate,
        bound: _Bound,
        prompts: list[list[int]],
        input_ids: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any,
    ) -> None:
        self.criteria, self.streamer, self.prompts = criteria, streamer, prompts
        self.generation_config, self.keeps_scores = generation_config, _wants_scores(generation_config)
        self.size = len(prompts)
        self.strategy = settings.plan(bound.reader, _sampling(generation_config))
        self.reader = bound.reader if "adapter" in self.strategy.needs else None
        eos = _eos_ids(criteria)
        self.has_eos = eos is not None
        loaded = replace(bound.loaded, stop_ids=eos or frozenset(), execution=settings.execution)
        loaded.__dict__["reserved"] = bound.loaded.reserved  # found once
        self.engine = Engine(loaded, self.size, self.reader)
        self.processors = LogitsProcessorList(
            [processor for processor in processors if not _is_done_already(processor, self.engine, generation_config)]
        )
        self.max_new_tokens = _max_length(criteria) - input_ids.shape[1]
        self.pad = _pad_id(generation_config)
        self.sequences = input_ids  # on its own device, as processors and criteria expect
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        sequences = self._in_step() if self._steps_together() else self._freely()
        if self.streamer is not None:
            self.streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return sequences
        scores = _own(self.scores) if self.generation_config.output_scores else None
        logits = _own(self.logits) if self.generation_config.output_logits else None
        return GenerateDecoderOnlyOutput(sequences=sequences, scores=scores, logits=logits)  # type: ignore[arg-type]

    def _steps_together(self) -> bool:
        """Whether somebody looks at every step of the whole batch; if not, no row waits for another."""
        is_plain = all(isinstance(item, (MaxLengthCriteria, EosTokenCriteria)) for item in self.criteria)
        return bool(self.processors) or not is_plain or self.streamer is not None or self.keeps_scores

    def _decoder(self, adjust: Callable[[Sequence[int], Tensor], Tensor] | None) -> Decoder:
        return Decoder(self.engine, self.strategy, None, self.max_new_tokens, adjust=adjust)

    def _requests(self) -> list[Request]:
        return [Request(index, prompt) for index, prompt in enumerate(self.prompts)]

    def _freely(self) -> Tensor:
        new: list[list[int]] = [[] for _ in self.prompts]
        for step in self._decoder(None).run(self._requests()):
            new[step.request].append(step.token_id)
        width = max(len(row) for row in new)
        tokens = torch.tensor([row + [self.pad] * (width - len(row)) for row in new])
        return torch.cat([self.sequences, tokens.to(self.sequences)], dim=-1)

    def _in_step(self) -> Tensor:
        """All rows step together, as in transformers' own loop; processors and criteria see the batch after every step."""
        decoder = self._decoder(self._adjust)
        running = set(range(self.size))
        tokens: dict[int, int] = {}
        for step in decoder.run(self._requests()):
            tokens[step.request] = step.token_id
            if len(tokens) < len(running):
                continue
            done = self._append([tokens.get(index, self.pad) for index in range(self.size)])
            tokens.clear()
            if all(done[index] for index in running):
                break
            if self.has_eos:  # without one, transformers goes on with every row until all are done
                for index in [index for index in running if done[index]]:
                    decoder.stop(index)
                    running.discard(index)
        return self.sequences

    def _append(self, tokens: list[int]) -> list[bool]:
        """Add a token to every row; which rows the criteria call done."""
        new = torch.tensor(tokens, device=self.sequences.device)
        self.sequences = torch.cat([self.sequences, new[:, None]], dim=-1)
        scores: Any = tuple(self.scores) if self.generation_config.output_scores else None
        ids: Any = self.sequences
        done: Any = self.criteria(ids, scores)
        if self.streamer is not None:
            self.streamer.put(new.cpu())
        return done.tolist()

    def _adjust(self, rows: Sequence[int], logits: Tensor) -> Tensor:
        """Processors on the whole batch, [B, V]; finished rows are zeros, which nobody reads."""
        is_whole = list(rows) == list(range(self.size))
        batch = logits.to(self.sequences.device)
        if not is_whole:
            batch = batch.new_zeros(self.size, batch.shape[-1])
            batch[list(rows)] = logits.to(batch)
        if self.keeps_scores:
            self.logits.append(batch.clone())
        ids: Any = self.sequences
        scores: Any = self.processors(ids, batch)
        if self.keeps_scores:
            self.scores.append(scores)
        return (scores if is_whole else scores[list(rows)]).to(logits)


# The model


@dataclass(frozen=True)
class _Bound:
    """A model with what was attached to it, kept on the model so that it happens once."""

    key: tuple[Any, ...]
    loaded: LoadedModel
    reader: SelectorReader | None


def _bind(model: Any, adapter: str | Path | None, tokenizer: Any) -> _Bound:
    """The model as this package sees it, with its selector attached; the same objects at the next call."""
    bound: _Bound | None = model.__dict__.get(_BOUND)
    key = (_stamp(adapter), model.name_or_path, model.device, model.dtype, id(tokenizer) if tokenizer else None)
    if bound is not None and bound.key == key:
        return bound
    detach(model)
    if attached_adapter(model) is not None or _has_peft_layers(model):
        raise ValueError(
            "this model has adapter layers already; merge or unload them, or load the base model, and let "
            "s2t.custom_generate attach its own."
        )
    name = model.name_or_path or type(model).__name__
    tokenizer = tokenizer if tokenizer is not None else _tokenizer(name)
    loaded = wrap_model(name, model, tokenizer, open_merged(local_folder(name)))
    needs_grad = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        bound = _Bound(key, loaded, load_selector(adapter, loaded))  # draws weights before it reads them
    for parameter in needs_grad:  # PEFT froze them
        parameter.requires_grad_(True)
    model.__dict__[_BOUND] = bound
    return bound


def _is_of_merged(model: Any) -> bool:
    """Whether the model was loaded from a merged folder; the hub is asked before the first call only."""
    bound: _Bound | None = model.__dict__.get(_BOUND)
    if bound is not None and bound.loaded.merged is not None:
        return True
    return is_merged(local_folder(model.name_or_path or type(model).__name__))


def _stamp(adapter: str | Path | None) -> tuple[str, int] | None:
    """An adapter folder and when it was written, so that one trained again is attached again."""
    if adapter is None:
        return None
    file = Path(adapter) / CONFIG_FILE
    return str(Path(adapter).resolve()), file.stat().st_mtime_ns if file.is_file() else 0


def _has_peft_layers(model: Any) -> bool:
    return any("lora_" in name or ".base_layer." in name for name, _ in model.named_parameters())


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer was found at {name}, where the model came from; pass s2t.custom_generate(tokenizer=...)."
        ) from error


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Inference in eval mode with an adapter that sleeps again afterwards, whatever happens."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        if (attached := attached_adapter(model)) is not None:
            attached.act(False)
        for module in training:
            module.training = True


# The arguments of `generate`


def _caller_arguments() -> dict[str, Any]:
    """What `generate` was given and does not hand to a callable: transformers 5.23 keeps streamer and assistant to itself.

    A streamer has got the prompt by then; one that is never ended leaves its reader waiting.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _GENERATE:
        frame = frame.f_back
    names = ("streamer", "assistant_model", "synced_gpus")
    return {name: frame.f_locals.get(name) for name in names} if frame is not None else {}


def _refuse(
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
        "output_scores or output_logits of a batch": _wants_scores(config)
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


def _wants_scores(config: Any) -> bool:
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


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """Every row's ids without padding; raises ValueError for an empty one."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
    prompts = [row[real.bool()].tolist() for row, real in zip(input_ids, mask, strict=True)]
    if not all(prompts):
        raise ValueError(f"row {prompts.index([])} of input_ids is empty or masked altogether; give it a token.")
    return prompts


def _eos_ids(criteria: StoppingCriteriaList) -> frozenset[int] | None:
    """The ids that end a row, as the criteria have them; None where there are none."""
    found: list[Any] = [item.eos_token_id for item in criteria if hasattr(item, "eos_token_id")]
    if not found:
        return None
    return frozenset(int(i) for ids in found for i in torch.as_tensor(ids).flatten().tolist())


def _pad_id(config: Any) -> int:
    """What finished rows are filled with: the pad token, else the first end token, as transformers has it."""
    eos = config.eos_token_id
    first = eos[0] if isinstance(eos, (list, tuple)) else eos
    return int(config.pad_token_id if config.pad_token_id is not None else first if first is not None else 0)


def _max_length(criteria: StoppingCriteriaList) -> int:
    lengths = [item.max_length for item in criteria if isinstance(item, MaxLengthCriteria)]
    if not lengths:
        raise ValueError("s2t.custom_generate needs a length limit; pass max_new_tokens.")
    return min(lengths)


def _sampling(config: Any) -> Sampling | None:
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


def _is_done_already(processor: Any, engine: Engine, config: Any) -> bool:
    """Whether the loop does what this processor would: sampling filters, and keeping reserved ids out."""
    if isinstance(processor, SuppressTokensLogitsProcessor):
        forbidden = {*engine.forbidden_ids.tolist(), *_reserved(engine)}
        return not _wants_scores(config) and set(processor.suppress_tokens.tolist()) <= forbidden
    return bool(config.do_sample) and isinstance(processor, _WARPERS)


def _reserved(engine: Engine) -> tuple[int, ...]:
    return (engine.adapter.reserved if engine.adapter is not None else engine.loaded.reserved).all


def _own(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Ordinary tensors, free of inference mode."""
    return tuple(tensor.clone() for tensor in tensors)
