"""Settings of `s2t train-router`: the small networks of r2r and zip-rc."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from s2t.config.checks import Readers, check_at_least, check_choice, check_effects, check_positive, check_range, require
from s2t.config.shared import ChatConfig, ModelConfig, TaskConfig


@dataclass(frozen=True)
class RouterConfig(TaskConfig, ChatConfig, ModelConfig):
    """`s2t train-router`: the router of strategy r2r, or the forecasts of zip-rc."""

    llm: str | None = "tiny:llm"
    """Hub id, folder, or `tiny:llm`: the reference that goes on from the SLM's tokens."""
    method: str = "r2r"
    """r2r (a router, into the run's folder `router`; needs the LLM) or zip-rc (a head that foretells how and when a sample of the
    SLM ends, into `forecast`)."""
    out: str = "runs/router"
    """Folder of this run; rerunning resumes."""
    num_samples: int = 4
    """Of zip-rc: samples of each problem."""
    temperature: float = 0.7
    """Of zip-rc: of these samples; above 0."""
    top_p: float = 0.95
    """Of zip-rc: the share of probability that they keep."""
    max_partings: int = 8
    """Places of an answer where the SLM's token differs that are tried, at most; evenly spread."""
    num_steps: int = 400
    """Optimizer steps of the network."""
    target_rate: float = 0.05
    """Share of the SLM's tokens on the calibration split at which the router fires; its threshold follows from it."""
    calibration_limit: int = 200
    """Calibration problems that the threshold comes from."""
    warmup_steps: int = 3
    """The first tokens of an answer, which never fire and do not count for the threshold."""
    max_new_tokens: int = 256
    """Length limit of one answer, in tokens."""
    batch_size: int = 64
    """Sequences written at once."""
    shard_size: int = 64
    """Problems per file; a killed run loses one shard at most."""

    def __post_init__(self) -> None:
        self.check_model()
        self.check_chat()
        self.check_task()
        check_choice("method", self.method, ("r2r", "zip-rc"))
        check_at_least(1, num_samples=self.num_samples)
        check_positive(temperature=self.temperature)
        require(0 < self.top_p <= 1, f"top_p must be within (0, 1]; got {self.top_p}.")
        check_range("target_rate", self.target_rate, 0, 1)
        check_at_least(1, max_partings=self.max_partings, num_steps=self.num_steps, shard_size=self.shard_size)
        check_at_least(1, calibration_limit=self.calibration_limit, max_new_tokens=self.max_new_tokens)
        check_at_least(1, batch_size=self.batch_size)
        check_at_least(0, warmup_steps=self.warmup_steps)

    def check_given(self, names: Collection[str]) -> None:
        """Raise ConfigError where one of these settings has no effect on the method."""
        of_r2r = ("max_partings", "target_rate", "calibration_limit", "warmup_steps")
        of_samples = ("num_samples", "temperature", "top_p")
        readers: Readers = {**dict.fromkeys(of_r2r, ("r2r",)), **dict.fromkeys(of_samples, ("zip-rc",))}
        check_effects(names, [self.method], readers, "method")
