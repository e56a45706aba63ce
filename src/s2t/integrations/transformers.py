"""transformers' `generate` with this package's loop inside: `model.generate(**inputs, custom_generate=s2t.custom_generate(...))`.

transformers prepares inputs, processors and stopping criteria; the loop runs on the caller's own model and gives back what
`generate` gives back. An adapter is attached once and sleeps between calls, so that plain `generate` stays as it was. What
the loop cannot do raises ValueError; nothing is ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationMixin, StoppingCriteriaList
from transformers.generation.logits_process import (
    LogitsProcessorList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from s2t.config import DecodeConfig, build_config
from s2t.decode.loop import Decoder
from s2t.decode.workload import strategy_of
from s2t.errors import ConfigError, ModelError
from s2t.integrations import asked
from s2t.methods.sample import Sampling
from s2t.methods.strategies import Strategy
from s2t.model.adapter import ATTACHED, SelectorAdapter, SelectorReader, load_selector
from s2t.model.engine import Engine
from s2t.model.load import wrap_model
from s2t.model.loaded import LoadedModel
from s2t.model.merged import CONFIG_FILE, is_merged, local_folder, open_merged
from s2t.records import Request

STRATEGIES = ("greedy", "s2t-local")
SETTINGS = ("trigger", "threshold", "calibration", "num_candidates", "warmup_steps")
_BOUND = "_s2t_bound"
_MIXIN: Any = GenerationMixin


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
    model.__dict__.pop("save_pretrained", None)
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
        caller = asked.caller_arguments()
        streamer = streamer if streamer is not None else caller.get("streamer")
        asked.refuse(model, input_ids, generation_config, model_kwargs, caller, synced_gpus)
        with _as_it_was(model):
            bound = _bind(model, self.adapter, self.tokenizer)
            prompts = asked.prompts(input_ids, model_kwargs.get("attention_mask"))
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
        strategy = strategy_of(name, self.config, trained)
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
        self.generation_config, self.keeps_scores = generation_config, asked.wants_scores(generation_config)
        self.size = len(prompts)
        self.strategy = settings.plan(bound.reader, asked.sampling(generation_config))
        self.reader = bound.reader if "adapter" in self.strategy.needs else None
        eos = asked.eos_ids(criteria)
        self.has_eos = eos is not None
        loaded = replace(bound.loaded, stop_ids=eos or frozenset(), execution=settings.execution)
        loaded.__dict__["reserved"] = bound.loaded.reserved  # found once
        self.engine = Engine(loaded, self.size, self.reader)
        self.processors = LogitsProcessorList(
            [
                processor
                for processor in processors
                if not asked.is_done_already(processor, self.engine, generation_config)
            ]
        )
        self.max_new_tokens = asked.max_length(criteria) - input_ids.shape[1]
        self.pad = asked.pad_id(generation_config)
        self.sequences = input_ids  # on its own device, as processors and criteria expect
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def run(self) -> Tensor | GenerateDecoderOnlyOutput:
        sequences = self._in_step() if self._steps_together() else self._freely()
        if self.streamer is not None:
            self.streamer.end()
        if not self.generation_config.return_dict_in_generate:
            return sequences
        scores = asked.own(self.scores) if self.generation_config.output_scores else None
        logits = asked.own(self.logits) if self.generation_config.output_logits else None
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
    if model.__dict__.get(ATTACHED) is not None or _has_peft_layers(model):
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
    if isinstance(bound.reader, SelectorAdapter):
        model.__dict__["save_pretrained"] = partial(_save_detached, model)
    return bound


def _save_detached(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a model with an adapter attached: the model as it was given, without it."""
    detach(model)
    return model.save_pretrained(*args, **kwargs)


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
        if (attached := model.__dict__.get(ATTACHED)) is not None:
            attached.act(False)
        for module in training:
            module.training = True
