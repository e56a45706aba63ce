"""`s2t merge`: an adapter and its base model become one folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import MergeConfig


def show(merged: Mapping[str, Any]) -> None:
    adapter = merged["adapter"]
    facts = {"folder": merged["folder"], "base model": adapter["base_model"], "scope": adapter["scope"]}
    print_facts("merge", facts | {"dtype": merged["dtype"], "weights files": len(merged["weights"])})


@with_options(MergeConfig, show)
def command(config: MergeConfig) -> Any:
    """Merge an adapter and its base model into one folder that loads like any causal LM."""
    from s2t.merge import merge

    return merge(config)
