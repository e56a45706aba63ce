"""The workflows as plain functions: the settings of each command as keywords, its result as a dictionary.

Each writes a run folder and resumes it when it is called again. `docs/cli.md` lists the settings and their defaults; a
setting that is unknown or out of range raises ConfigError.
"""

from __future__ import annotations

from typing import Any

from s2t.config import (
    CalibrateConfig,
    CollectConfig,
    DistillConfig,
    EvalConfig,
    MeasureConfig,
    RouterConfig,
    TrainConfig,
    build_config,
)


def measure(**settings: Any) -> dict[str, Any]:
    """Local sufficiency of a pair on problems: measure.json. Source: arXiv 2604.26940, hit rate at divergence points."""
    from s2t.measure import measure as run

    return run(build_config(MeasureConfig, flags=settings))


def calibrate(**settings: Any) -> dict[str, Any]:
    """A measured run of the calibration split becomes thresholds: calibration.json."""
    from s2t.measure import calibrate as run

    return run(build_config(CalibrateConfig, flags=settings))


def collect(**settings: Any) -> dict[str, Any]:
    """Problems of the train split become selection groups in parquet shards; returns their counts."""
    from s2t.collect import collect as run

    return run(build_config(CollectConfig, flags=settings))


def train(**settings: Any) -> dict[str, Any]:
    """Selection groups become an adapter, in the run folder's `adapter`; returns train.json."""
    from s2t.train.trainer import train as run

    return run(build_config(TrainConfig, flags=settings))


def train_router(**settings: Any) -> dict[str, Any]:
    """Where the SLM's tokens part answers from the LLM's becomes the router of r2r, in the run folder's `router`."""
    from s2t.train.router import train_router as run

    return run(build_config(RouterConfig, flags=settings))


def distill(**settings: Any) -> dict[str, Any]:
    """The LLM's answers or distributions become a LoRA of the SLM, in the run folder's `adapter`; returns distill.json."""
    from s2t.train.distill import distill as run

    return run(build_config(DistillConfig, flags=settings))


def evaluate(**settings: Any) -> dict[str, Any]:
    """Problems x strategies become graded results; returns summary.json: accuracies with intervals, paired tests, costs."""
    from s2t.evaluate import evaluate as run

    return run(build_config(EvalConfig, flags=settings))
