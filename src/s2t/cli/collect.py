"""`s2t collect`: problems become selection groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import CollectConfig


def show(collected: Mapping[str, Any]) -> None:
    shards = collected.get("shards")
    facts = {**collected, "shards": len(shards) if isinstance(shards, (list, tuple)) else shards}
    print_facts("collect", facts)


@with_options(CollectConfig, show)
def command(config: CollectConfig) -> Any:
    """Collect selection groups for training, shard by shard; rerunning resumes."""
    from s2t.collect import collect

    return collect(config)
