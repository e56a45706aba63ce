"""`s2t push`: an adapter becomes a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import PushConfig


def show(pushed: Mapping[str, Any]) -> None:
    seen = "private" if pushed["private"] else "public"
    print_facts("push", {"repository": pushed["url"], "seen by": seen, "files": len(pushed["files"])})
    print(f"Load it with --adapter {pushed['repo']}")


@with_options(PushConfig, show)
def command(config: PushConfig) -> Any:
    """Upload an adapter to the Hugging Face hub, private unless --public, to be named OWNER/NAME from then on."""
    from s2t.push import push

    return push(config)
