"""The Python interface: load models once, then generate or stream text under any strategy.

`s2t.load(...).generate("...")` is the usual way; the module functions of the same names load, answer and
forget. Speaks text; everything below it speaks token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

from s2t.config import NEEDS_LLM, STRATEGIES, DecodeConfig, ModelConfig, build_config
from s2t.decode.loop import Request
from s2t.decode.session import Generated, Session
from s2t.decode.strategies import Strategy, build_strategy, vote
from s2t.decode.workload import read_thresholds
from s2t.errors import ConfigError
from s2t.model.adapter import load_selector
from s2t.model.chat import Detokenizer, decode_ids
from s2t.model.load import LoadedModel, check_pair, load_model
from s2t.records import Cost, Step
from s2t.tasks.graders import canonical_answer, extract_answer

_LOAD_SETTINGS = frozenset({"llm", "adapter", "dtype", "device", "trust_remote_code", "execution"})


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer. `text` leaves the stop token out, `token_ids` and `steps` keep it.

    Under self-consistency it is the winning sample, `cost` is that of all of them and `samples` holds them.
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
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    execution: str = "auto",
) -> Reasoner:
    """Load an SLM, with an LLM and an adapter where they are given; most strategies need neither.

    A folder that `s2t merge` wrote brings its selector with it.

    `execution`: eager, static (CUDA graphs on a GPU), compile (torch.compile as well), or auto.

    Raises ModelError or ConfigError, one line, for what is missing, unsupported or does not fit together.
    """
    values = {
        "slm": slm,
        "llm": llm,
        "dtype": dtype,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "execution": execution,
    }
    config = build_config(ModelConfig, flags=values)
    config.check_model()
    small = _load(config.slm, config)
    selector = load_selector(adapter, small)
    large = _load(config.llm, config) if config.llm is not None else None
    if large is not None:
        check_pair(small, large)
    return Reasoner(Session(small, large, selector))


def generate(prompt: str | list[str], slm: str = "tiny:slm", **settings: Any) -> Generation | list[Generation]:
    """Load, answer and forget; takes the keywords of `load` and of `Reasoner.generate` together."""
    loading, rest = _parted(settings)
    return load(slm, **loading).generate(prompt, **rest)


def stream(prompt: str, slm: str = "tiny:slm", **settings: Any) -> Iterator[str]:
    """Load and stream one answer; takes the keywords of `load` and of `Reasoner.stream` together."""
    loading, rest = _parted(settings)
    return load(slm, **loading).stream(prompt, **rest)


class Reasoner:
    """Loaded models that answer prompts; settings are the fields of `DecodeConfig`, given per call."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @overload
    def generate(
        self, prompt: str, strategy: str | None = ..., *, seed: int = ..., trace: bool = ..., **settings: Any
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str],
        strategy: str | None = ...,
        *,
        seed: int = ...,
        trace: bool = ...,
        **settings: Any,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: str | list[str],
        strategy: str | None = None,
        *,
        seed: int = 0,
        trace: bool = False,
        **settings: Any,
    ) -> Generation | list[Generation]:
        """Answer a prompt, or a list of them in one batch; no answer depends on the other prompts.

        `strategy` is `s2t-local` where an adapter or a merged model was loaded, else `greedy`. `trace` keeps the candidates of
        every step instead of those of triggered steps alone. Raises ConfigError for settings that are
        unknown, out of range or need a model that was not loaded.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        plan = self._plan(strategy, seed, settings)
        requests = plan.requests(prompts)
        session = replace(self.session, batch_size=plan.config.batch_size)
        done = session.run(plan.strategy, requests, plan.config.max_new_tokens, keep_steps=True, trace=trace)
        size = plan.num_samples
        answers = [self._answer(done[start : start + size]) for start in range(0, len(done), size)]
        return answers[0] if isinstance(prompt, str) else answers

    def stream(self, prompt: str, strategy: str | None = None, *, seed: int = 0, **settings: Any) -> Iterator[str]:
        """The answer to one prompt in pieces, as it is written; pieces joined are the text of `generate`.

        Self-consistency has nothing to show before the vote: its answer comes in one piece. Raises as
        `generate` does, before the first piece.
        """
        plan = self._plan(strategy, seed, settings)
        requests = plan.requests([prompt])
        if plan.num_samples > 1:
            return iter([self.generate(prompt, strategy, seed=seed, **settings).text])
        return self._pieces(self.session.steps(plan.strategy, requests, plan.config.max_new_tokens))

    def _plan(self, name: str | None, seed: int, settings: dict[str, Any]) -> _Plan:
        """Settings and strategy of one call, checked against what was loaded."""
        session = self.session
        if name is None:
            name = "greedy" if session.adapter is None else "s2t-local"
        _check_settings(name, settings, session)
        config = build_config(DecodeConfig, flags=settings)
        config.check_decode()
        trained = session.adapter.config if session.adapter is not None and name == "s2t-local" else None
        thresholds = read_thresholds(config.calibration) | (trained.thresholds if trained is not None else {})
        k = trained.num_candidates if trained is not None else None
        return _Plan(session, config, build_strategy(name, config, thresholds, k, seed))

    def _pieces(self, steps: Iterable[Step]) -> Iterator[str]:
        text = Detokenizer(self.session.slm.tokenizer)
        for step in steps:
            if step.finish_reason != "stop" and (piece := text.push(step.token_id)):
                yield piece
        if rest := text.finish():
            yield rest

    def _answer(self, sequences: Sequence[Generated]) -> Generation:
        samples = [self._generation(sequence) for sequence in sequences]
        if len(samples) == 1:
            return samples[0]
        answers = [_answer_of(sample.text) for sample in samples]
        winner = samples[answers.index(vote(answers))]
        return replace(winner, cost=sum((sample.cost for sample in samples), Cost()), samples=samples)

    def _generation(self, done: Generated) -> Generation:
        shown = done.token_ids[:-1] if done.finish_reason == "stop" else done.token_ids
        return Generation(
            text=decode_ids(self.session.slm.tokenizer, shown),
            token_ids=done.token_ids,
            steps=done.steps,
            cost=done.cost,
            finish_reason=done.finish_reason,
            num_triggered=done.num_triggered,
            num_flips=done.num_flips,
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one call does, before any token is written."""

    session: Session
    config: DecodeConfig
    strategy: Strategy

    @property
    def num_samples(self) -> int:
        return self.config.num_samples if self.strategy.name == "self-consistency" else 1

    def requests(self, prompts: list[str]) -> list[Request]:
        """One request per prompt and sample; random numbers depend on the prompt's own text.

        The same prompt twice in one list gets other random numbers the second time.
        """
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(f"prompt must be text or a list of texts; got {str(prompts)[:60]!r}.")
        requests: list[Request] = []
        seen: dict[str, int] = {}
        for prompt in prompts:
            ids = self.session.prompt(prompt)
            for _ in range(self.num_samples):
                place = seen[prompt] = seen.get(prompt, -1) + 1
                requests.append(Request(len(requests), ids, f"{prompt}/{place}"))
        return requests


def _load(name: str, config: ModelConfig) -> LoadedModel:
    return load_model(name, **config.load_options)


def _parted(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    loading = {name: value for name, value in settings.items() if name in _LOAD_SETTINGS}
    return loading, {name: value for name, value in settings.items() if name not in _LOAD_SETTINGS}


def _check_settings(name: str, settings: dict[str, Any], session: Session) -> None:
    """Refuse what belongs to `load`, what nobody knows, and a strategy whose model was not loaded."""
    if misplaced := sorted(settings.keys() & (_LOAD_SETTINGS | {"slm"})):
        raise ConfigError(f"{', '.join(misplaced)} is given when loading: s2t.load({misplaced[0]}=...).")
    known = {item.name for item in fields(DecodeConfig)} - _LOAD_SETTINGS
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}.")
    if name not in STRATEGIES:
        raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}.")
    if name in NEEDS_LLM and session.llm is None:
        raise ConfigError(f"strategy {name} needs the LLM; pass --llm MODEL, or s2t.load(llm=...).")
    if name == "s2t-local" and session.adapter is None:
        raise ConfigError(
            "strategy s2t-local needs an adapter, a folder written by `s2t train`; pass --adapter FOLDER, "
            "or s2t.load(adapter=...)."
        )


def _answer_of(text: str) -> str | None:
    """The answer a text votes for: a marked answer or the last number, else the last line."""
    return canonical_answer(extract_answer(text, True) or extract_answer(text, False))
