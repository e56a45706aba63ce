"""`s2t distill`: the LLM's answers or distributions become an ordinary LoRA of the SLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import DistillConfig


def show(distilled: Mapping[str, Any]) -> None:
    print_facts("distill", {**distilled, "final loss, nats per token": distilled["final"]["loss"]})


@with_options(DistillConfig, show)
def command(config: DistillConfig) -> Any:
    """Distil the LLM into a LoRA of the SLM, the baseline to compare selection with; rerunning resumes."""
    from s2t.train.distill import distill
    from s2t.train.processes import is_first_process

    distilled = distill(config)
    return distilled if is_first_process() else None
