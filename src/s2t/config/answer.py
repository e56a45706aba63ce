"""Settings of the commands that answer: generate and chat, serve, eval."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from s2t.config.checks import check_at_least, check_choice, check_effects, check_positive, check_range, require
from s2t.config.methods import MANY_SAMPLES, METHODS, SERVED, STRATEGIES, TRIGGERED, TRIGGERS, WRITERS, unit_of
from s2t.config.shared import (
    READERS,
    ChatConfig,
    DecodeConfig,
    EngineConfig,
    ModelConfig,
    ServedConfig,
    ShardConfig,
    TaskConfig,
)


@dataclass(frozen=True)
class GenerateConfig(DecodeConfig, ServedConfig, ChatConfig, EngineConfig, ModelConfig):
    """`s2t generate` and `s2t chat`."""

    strategy: str | None = None
    """greedy, sample, self-consistency, self-certainty, llm, takeover, s2t or s2t-local; None is s2t-local with an adapter or a
    merged model, else greedy. Or another method: speculative, r2r, specreason, smart, glimprouter, relay, contrastive,
    context-aware, dola, multiplex, confidence, forecast, local-branch or released."""
    seed: int = 0
    """Seed of sampling and of the random trigger."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_engine()
        self.check_chat()
        self.check_remote()
        self.check_decode()
        check_at_least(0, seed=self.seed)
        if self.strategy is not None:
            base, mark, trigger = self.strategy.partition("@")
            require(
                not mark or base not in TRIGGERED,
                f"one strategy has its trigger apart; pass --strategy {base} --trigger {trigger}, got {self.strategy!r}.",
            )
            check_choice("strategy", self.strategy, WRITERS)

    def check_given(self, names: Collection[str]) -> None:
        """Raise ConfigError where one of these settings has no effect; without a strategy the loaded model decides."""
        if self.strategy is not None:
            check_effects(names, [self.strategy], READERS)


@dataclass(frozen=True)
class ServeConfig(DecodeConfig, ServedConfig, ChatConfig, EngineConfig, ModelConfig):
    """`s2t serve`: an OpenAI-compatible server; decoding settings are those of requests that do not give their own."""

    strategy: str | None = None
    """Of requests that name none: greedy, s2t-local, s2t, takeover or llm; None is s2t-local with an adapter or a merged model,
    else greedy. A temperature above 0 means sample."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    served_name: str | None = None
    """Name of the model in requests and answers; None takes that of --slm."""
    batch_size: int = 32
    """Sequences written at once, for each strategy in use; with --slm-url in all."""
    patience_s: float = 10.0
    """Of an SLM on servers: seconds to wait for one to come back when all have failed, before requests end with 503."""
    max_queue: int = 256
    """Sequences that may wait for a free row beyond those; more are refused with 429."""
    max_length: int = 4096
    """Longest prompt and answer together, in tokens, if the model can read that many."""
    max_body_bytes: int = 2**20
    """Largest body of a request."""
    request_timeout_s: float = 600.0
    """Seconds from a request's arrival to the end of its answer."""
    drain_s: float = 30.0
    """Seconds that running requests get to finish when the server is asked to stop."""
    api_key_file: str | None = None
    """File with the key that clients must send; without it the variable S2T_API_KEY, and without that no key is asked for."""
    no_auth: bool = False
    """Allow an address that others can reach without a key."""

    num_samples: int = field(default=1, init=False)  # no setting of a server: requests ask for n choices
    llm_url: list[str] = field(default_factory=list, init=False)  # the LLM runs in the server's own process

    def __post_init__(self) -> None:
        self.check_model()
        self.check_engine()
        self.check_chat()
        self.check_remote()
        self.check_decode()
        require(
            not (self.slm_urls and self.llm),
            "with slm_url the server writes with greedy and s2t-local, which need no LLM; drop --llm or --slm-url.",
        )
        if self.strategy is not None:
            check_choice(
                "strategy", self.strategy, tuple(name for name in SERVED if name not in ("sample", *MANY_SAMPLES))
            )
        check_range("port", self.port, 0, 65535)
        check_at_least(0, max_queue=self.max_queue, drain_s=self.drain_s)
        check_at_least(2, max_length=self.max_length)
        check_at_least(64, max_body_bytes=self.max_body_bytes)
        check_positive(request_timeout_s=self.request_timeout_s)


@dataclass(frozen=True)
class EvalConfig(DecodeConfig, TaskConfig, ServedConfig, ShardConfig, ChatConfig, EngineConfig, ModelConfig):
    """`s2t eval`: problems x strategies become graded results, scores with intervals and paired tests."""

    llm: str | None = None
    """Hub id, folder, or `tiny:llm`; needed by llm, takeover and s2t."""
    strategies: str = "greedy,s2t-local"
    """Comma-separated: greedy, sample, self-consistency, self-certainty, llm, takeover, s2t, s2t-local; the last three also
    with a trigger of their own, such as s2t@entropy. Other methods: those of generate, and over finished answers cascade,
    frugalgpt, knn-routing, borda, deepconf and zip-rc."""
    out: str = "runs/eval"
    """Folder of this run; rerunning resumes it."""
    split: str = "test"
    """train, calibration or test."""
    heldout_templates: float = 0.25
    """Share of templates reported as unseen; the adapter's own list goes first."""
    shard_size: int = 128
    """Problems per file; a killed run loses one shard at most."""
    known: str | None = None
    """Finished run of `s2t eval` with confidence and llm on other problems, from which frugalgpt and knn-routing learn."""
    num_traces: int | None = None
    """Problems of which every token is kept, for the report to show; the first ones of the run. None keeps 32; beside an LLM,
    which reads them again, one in a hundred and at least 5, so that this costs little."""
    num_seeds: int = 1
    """Seeds of whatever draws at random (samples and the trigger random); the problems are those of --seed."""
    card: bool = False
    """Put the accuracies into the model card (README.md) of the adapter's folder; `s2t merge` takes them from there."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_engine()
        self.check_chat()
        self.check_shards()
        self.check_task()
        self.check_decode()
        require(
            not self.card or self.adapter is not None, "--card writes into an adapter's folder; pass --adapter FOLDER."
        )
        check_range("heldout_templates", self.heldout_templates, 0, 0.9)
        check_at_least(1, shard_size=self.shard_size, num_seeds=self.num_seeds)
        if self.num_traces is not None:
            check_at_least(0, num_traces=self.num_traces)
        names = self.strategy_names
        for name in names or ("",):
            base, mark, trigger = name.partition("@")
            check_choice("strategies", base, STRATEGIES)
            if mark:
                require(base in TRIGGERED, f"strategies: only {', '.join(TRIGGERED)} take a trigger; got {name!r}.")
                check_choice(f"trigger of {base}", trigger, TRIGGERS)
            require(names.count(name) == 1, f"strategies must differ; got {name} more than once.")
        units = dict.fromkeys(unit for name in names if (unit := unit_of(name, self.trigger)) is not None)
        require(
            self.threshold is None or len(units) < 2,
            f"one --threshold cannot serve {' and '.join(units)}, whose units differ; evaluate them in runs of "
            "their own, or pass --calibration.",
        )

    def check_given(self, names: Collection[str]) -> None:
        """Raise ConfigError where one of these settings has no effect on any of the strategies."""
        check_effects(names, [name.partition("@")[0] for name in self.strategy_names], READERS)

    @property
    def strategy_names(self) -> tuple[str, ...]:
        """All strategies that run: those given, behind those among whose answers one of them chooses."""
        given = [name.strip() for name in self.strategies.split(",") if name.strip()]
        needed = [base for name in given if name in METHODS for base in METHODS[name].over if base not in given]
        return (*dict.fromkeys(needed), *given)
