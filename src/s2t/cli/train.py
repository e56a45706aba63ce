"""`s2t train`: selection groups become an adapter."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import TrainConfig


def show(trained: Mapping[str, Any]) -> None:
    print_facts("train", trained)
    if trained.get("trigger_rate") == 0:
        print(
            "warning: the adapter never triggers on its own training problems, so that s2t-local would write what greedy writes; "
            "train longer, or at a higher --learning-rate.",
            file=sys.stderr,
        )


@with_options(TrainConfig, show)
def command(config: TrainConfig) -> Any:
    """Train the selector adapter on collected groups; rerunning resumes."""
    from s2t.train.processes import is_first_process
    from s2t.train.trainer import train

    trained = train(config)
    return trained if is_first_process() else None
