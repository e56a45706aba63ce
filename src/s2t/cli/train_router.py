"""`s2t train-router`: the router of r2r, from where the SLM's tokens part answers from the LLM's."""

from __future__ import annotations

from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import RouterConfig


def show(trained: dict[str, Any]) -> None:
    print_facts("train-router", trained)


@with_options(RouterConfig, show)
def command(config: RouterConfig) -> Any:
    """Train the router of strategy r2r: where would the SLM's token part from the LLM for good; rerunning resumes."""
    from s2t.train.router import train_router

    return train_router(config)
