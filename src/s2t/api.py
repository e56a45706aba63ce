"""The Python interface: load models once, then generate or stream text under any strategy.

`s2t.load(...).generate("...")` is the usual way; the module functions of the same names load, answer and
forget. Speaks text; everything below it speaks token ids.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

from transformers.utils.quantization_config import QuantizationConfigMixin

from s2t.config import (
    MANY_SAMPLES,
    READERS,
    STRATEGIES,
    WRITERS,
    ChatConfig,
    DecodeConfig,
    EngineConfig,
    ModelConfig,
    ServedConfig,
    build_config,
    check_effects,
    needs_of,
)
from s2t.decode.opening import open_pair
from s2t.decode.pair import Pair
from s2t.decode.workload import strategy_of
from s2t.errors import ConfigError
from s2t.methods.sample import choose_sample
from s2t.methods.strategies import Strategy
from s2t.model.adapter_config import AdapterConfig
from s2t.model.stops import StoppingText
from s2t.records import Cost, Generated, Request, Step
from s2t.tasks.graders import canonical_answer, extract_answer

Prompt = str | list[dict[str, str]]
Prompts = list[str] | list[list[dict[str, str]]]


@dataclass(frozen=True)
class _LoadConfig(ServedConfig, ChatConfig, EngineConfig, ModelConfig):
    """What `load` takes."""

    adapter: str | None = None

    def __post_init__(self) -> None:
        self.check_model()
        self.check_engine()
        self.check_chat()
        self.check_remote()


_FILES = ("calibration", "router", "forecast", "critical")  # settings that name them
_LOAD_SETTINGS = frozenset({item.name for item in fields(_LoadConfig)} - {"slm"})


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `text` leaves the stop token out, `token_ids` and `steps` keep it.

    Under self-consistency and self-certainty it is the winning sample, `cost` is that of all of them and `samples` holds them.
    """

    text: str
    token_ids: list[int]
    steps: list[Step]
    cost: Cost
    finish_reason: str
    num_triggered: int = 0
    num_flips: int = 0
    samples: list[Generation] = field(default_factory=list)


def load(
    slm: str = "tiny:slm",
    *,
    llm: str | None = None,
    adapter: str | None = None,
    quantization: str | dict[str, Any] | QuantizationConfigMixin | None = None,
    llm_quantization: str | dict[str, Any] | QuantizationConfigMixin | None = None,
    **settings: Any,
) -> Reasoner:
    """Load an SLM, with an LLM and an adapter where they are given; most strategies need neither.

    `slm` and `llm` are hub ids, folders, GGUF files, embedded models, or PEFT adapters (merged into their bases); `adapter`
    is what `s2t train` wrote (a folder or a hub id), and a folder that `s2t merge` or `s2t export` wrote brings its selector with
    it. `engine` says what runs GGUF files: llama.cpp (with `threads` and `context`), torch, or auto. A quantization is a name
    such as bitsandbytes-4bit, a dict with a `quant_method`, or a config of transformers. The other
    settings are the fields of `ModelConfig`: dtype, device, device_map, revision, llm_revision, trust_remote_code and
    execution (eager, static: CUDA graphs on a GPU, compile: torch.compile as well, or auto). `chat_template_kwargs` is a dict of
    variables for the models' chat templates, such as {"enable_thinking": False}. With
    `llm_url` (the base URL of an OpenAI-compatible server, or several) the LLM runs there, `llm` names its tokenizer, and the
    fields of `RemoteConfig` apply. With `slm_url` it is the SLM that runs on (vLLM) servers.

    Raises ModelError or ConfigError, one line, for what is missing, unsupported or does not fit together.
    """
    texts = {"quantization": _as_text(quantization), "llm_quantization": _as_text(llm_quantization)}
    given = {"slm": slm, "llm": llm, "adapter": None if adapter is None else str(adapter)}
    return open_reasoner(build_config(_LoadConfig, flags={**given, **texts, **settings}))


def open_reasoner(
    config: ModelConfig, strategies: Sequence[str] | None = None, with_llm: bool | None = None
) -> Reasoner:
    """As `load`, for settings that are checked already; see `decode.opening.open_pair`."""
    return Reasoner(open_pair(config, strategies, with_llm))


def generate(prompt: Prompt | Prompts, slm: str = "tiny:slm", **settings: Any) -> Generation | list[Generation]:
    """Load, answer and forget; takes the keywords of `load` and of `Reasoner.generate` together."""
    loading, rest = _parted(settings)
    return load(slm, **loading).generate(prompt, **rest)


def stream(prompt: Prompt, slm: str = "tiny:slm", **settings: Any) -> Iterator[str]:
    """Load and stream one answer; takes the keywords of `load` and of `Reasoner.stream` together."""
    loading, rest = _parted(settings)
    return load(slm, **loading).stream(prompt, **rest)


class Reasoner:
    """Loaded models that answer prompts; settings are the fields of `DecodeConfig`, given per call."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self._last: _Call | None = None

    @overload
    def generate(
        self, prompt: Prompt, strategy: str | None = ..., *, seed: int = ..., trace: bool = ..., **settings: Any
    ) -> Generation: ...
    @overload
    def generate(
        self, prompt: Prompts, strategy: str | None = ..., *, seed: int = ..., trace: bool = ..., **settings: Any
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Prompts,
        strategy: str | None = None,
        *,
        seed: int = 0,
        trace: bool = False,
        config: DecodeConfig | None = None,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Answer a prompt, or a list of them in one batch; no answer depends on the other prompts.

        A prompt is a text (one user message), or a list of messages: dicts of a role and a content. `strategy` is
        `s2t-local` where an adapter or a merged model was loaded, else `greedy`. `system` is a system prompt; `stop`, a text
        or several, ends an answer and is left out of it. `trace` keeps the candidates of every step instead of those of
        triggered steps alone. `config` gives all settings at once, in place of keywords.

        Raises ConfigError for settings that are unknown, out of range or need a model that was not loaded.
        """
        prompts, is_one = _as_prompts(prompt)
        plan = self._plan(strategy, seed, settings, config)
        requests = plan.numbered([self.pair.request(0, one, **plan.told) for one in prompts])
        answers = self._answers(plan, self.pair.write(plan.strategy, requests, trace=trace, **plan.limits))
        return answers[0] if is_one else answers

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        strategy: str | None = None,
        *,
        seed: int = 0,
        trace: bool = False,
        **settings: Any,
    ) -> list[Generation]:
        """As `generate`, for prompts given as token ids, which are used as they are: no chat template, no BOS."""
        plan = self._plan(strategy, seed, settings)
        if plan.config.system is not None:
            raise ConfigError("system has no place in a prompt of token ids; put its tokens into the ids.")
        if "bare" in plan.strategy.needs:
            raise ConfigError(
                f"strategy {plan.strategy.name} takes the context out of a text; pass the prompt to generate."
            )
        requests = plan.numbered([self.pair.request_of_ids(0, list(ids)) for ids in prompts])
        return self._answers(plan, self.pair.write(plan.strategy, requests, trace=trace, **plan.limits))

    def check(self, strategy: str | None = None, **settings: Any) -> None:
        """Raise as `generate` would for these settings, before there is a prompt."""
        self._plan(strategy, 0, settings)

    def stream(
        self,
        prompt: Prompt,
        strategy: str | None = None,
        *,
        seed: int = 0,
        config: DecodeConfig | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """The answer to one prompt in pieces, as it is written; pieces joined are the text of `generate`.

        Self-consistency has nothing to show before the vote: its answer comes in one piece. Raises as
        `generate` does, before the first piece.
        """
        plan = self._plan(strategy, seed, settings, config)
        prompts, is_one = _as_prompts(prompt)
        if not is_one:
            raise ConfigError("stream answers one prompt; pass a list of prompts to generate.")
        requests = plan.numbered([self.pair.request(0, one, **plan.told) for one in prompts])
        if plan.num_samples > 1:
            written = self.pair.write(plan.strategy, requests, trace=False, **plan.limits)
            return iter([answer.text for answer in self._answers(plan, written)])
        steps = self.pair.steps(plan.strategy, requests, plan.config.max_new_tokens, plan.config.stop)
        return self._pieces(plan, steps)

    def _plan(self, name: str | None, seed: int, settings: dict[str, Any], config: DecodeConfig | None = None) -> _Call:
        """Settings and strategy of one call, checked against what was loaded.

        Those of the last call are remembered, unless they name files, which may have changed since.
        """
        asked, selector = repr((name, seed, settings, config)), self.pair.selector_config
        last = self._last
        if last is None or last.asked != asked or last.selector is not selector or last.pair is not self.pair:
            last = _Call(asked, self.pair, selector, *self._checked(name, seed, settings, config))
            self._last = None if any(getattr(last.config, file) for file in _FILES) else last
        return last

    def _checked(
        self, name: str | None, seed: int, settings: dict[str, Any], config: DecodeConfig | None
    ) -> tuple[DecodeConfig, Strategy]:
        """The settings, and the strategy that they make."""
        name = self.pair.default_strategy if name is None else name
        given = [key for key, value in settings.items() if value is not None]
        if config is not None:
            if settings:
                raise ConfigError(
                    f"settings come as config or as keywords, not both; got {', '.join(settings)} beside config."
                )
            given = [key for key in READERS if getattr(config, key) != getattr(DecodeConfig, key)]
        _check_settings(name, settings, given)
        if config is None:
            config = build_config(DecodeConfig, flags=settings)
            config.check_decode()
        self.pair.check_has(name, config.trigger)
        trained = self.pair.selector_config if "adapter" in needs_of(name, config.trigger) else None
        return config, strategy_of(name, config, trained, seed)

    def _pieces(self, plan: _Call, steps: Iterable[Step]) -> Iterator[str]:
        text = StoppingText(self.pair.tokenizer_of(plan.strategy.name), plan.config.stop)
        stop_ids = self.pair.stop_ids_of(plan.strategy.name)
        for step in steps:
            is_stop_id = step.finish_reason == "stop" and step.token_id in stop_ids
            if not is_stop_id and (piece := text.push(step.token_id)):
                yield piece
        if rest := text.finish():
            yield rest

    def _answers(self, plan: _Call, written: Sequence[Generated]) -> list[Generation]:
        """The answers that sequences are: each its own, or the winner among the samples of a prompt."""
        size, answers = plan.num_samples, []
        for start in range(0, len(written), size):
            own = written[start : start + size]
            samples = [
                Generation(
                    self.pair.text(done, plan.config.stop, plan.strategy.name),
                    *(done.token_ids, done.steps, done.cost, done.finish_reason, done.num_triggered, done.num_flips),
                )
                for done in own
            ]
            if size == 1:
                answers += samples
                continue
            votes = [_answer_of(sample.text) for sample in samples]
            winner = samples[choose_sample(plan.strategy.name, votes, [done.mean_value for done in own])]
            cost = sum((sample.cost for sample in samples), Cost())
            answers.append(replace(winner, cost=cost, samples=samples))
        return answers


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call does, before any token is written: what was asked for, of which models, and what it came to."""

    asked: str
    pair: Pair
    selector: AdapterConfig | None
    config: DecodeConfig
    strategy: Strategy
    num_samples: int = field(init=False)
    told: dict[str, Any] = field(init=False)
    """What `Pair.request` is told beside the prompt."""
    limits: dict[str, Any] = field(init=False)
    """What `Pair.write` is told beside strategy and requests."""

    def __post_init__(self) -> None:
        config = self.config
        object.__setattr__(self, "num_samples", config.num_samples if self.strategy.name in MANY_SAMPLES else 1)
        limits = {"max_new_tokens": config.max_new_tokens, "stop": config.stop, "batch_size": config.batch_size}
        object.__setattr__(self, "limits", {"keep_steps": True, **limits})
        object.__setattr__(self, "told", {"system": config.system, "reads_bare": "bare" in self.strategy.needs})

    def numbered(self, prompts: Sequence[Request]) -> list[Request]:
        """One request per prompt and sample; a prompt that comes again gets other random numbers the second time."""
        requests: list[Request] = []
        seen: dict[str, int] = {}
        for request in prompts:
            for _ in range(self.num_samples):
                place = seen[request.key] = seen.get(request.key, -1) + 1
                requests.append(replace(request, index=len(requests), key=f"{request.key}/{place}"))
        return requests


def _as_prompts(prompt: Any) -> tuple[list[Prompt], bool]:
    """A prompt or a list of them as a list, and whether it was one; raises ConfigError for anything else."""
    if isinstance(prompt, str) or _is_messages(prompt):
        return [prompt], True
    if isinstance(prompt, list) and all(isinstance(item, str) or _is_messages(item) for item in prompt):
        return prompt, False
    raise ConfigError(f"prompt must be text, a list of messages, or a list of these; got {str(prompt)[:60]!r}.")


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, dict) for turn in prompt)


def _as_text(quantization: Any) -> str | None:
    """A name as it is; a dict, or a config of transformers, as JSON; raises ConfigError for anything else."""
    if quantization is None or isinstance(quantization, str):
        return quantization
    to_dict = getattr(quantization, "to_dict", None)
    values = quantization if to_dict is None else to_dict()
    if not isinstance(values, dict):
        raise ConfigError(f"quantization must be a name, a dict or a config of transformers; got {str(values)[:60]!r}.")
    return json.dumps(values, default=str)


def _parted(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    loading = {name: value for name, value in settings.items() if name in _LOAD_SETTINGS}
    return loading, {name: value for name, value in settings.items() if name not in _LOAD_SETTINGS}


def _check_settings(name: str, settings: Collection[str], given: Collection[str]) -> None:
    """Refuse what belongs to `load`, what nobody knows, and what the strategy does not read."""
    if misplaced := sorted(_LOAD_SETTINGS.union({"slm"}).intersection(settings)):
        raise ConfigError(f"{', '.join(misplaced)} is given when loading: s2t.load({misplaced[0]}=...).")
    known = {item.name for item in fields(DecodeConfig)} - _LOAD_SETTINGS
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    if name not in WRITERS:
        why = " works on finished runs; use s2t eval" if name in STRATEGIES else ""
        raise ConfigError(f"strategy must be one of {', '.join(WRITERS)}; got {name!r}{why}.")
    check_effects(given, [name], READERS)


def _answer_of(text: str) -> str | None:
    """The answer a text votes for: a marked answer or the last number, else the last line."""
    return canonical_answer(extract_answer(text, True) or extract_answer(text, False))
