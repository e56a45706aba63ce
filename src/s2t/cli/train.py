"""`s2t train`: selection groups become an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import TrainConfig


def show(trained: Mapping[str, Any]) -> None:
    print_facts("train", trained)


@with_options(TrainConfig, show)
def command(config: TrainConfig) -> Any:
    """Train the selector adapter on collected groups; rerunning resumes."""
    from s2t.train.trainer import train

    return train(config)
