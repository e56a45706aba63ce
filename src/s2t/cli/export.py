"""`s2t export`: an adapter and its base model become a folder of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts
from s2t.config import ExportConfig


def show(exported: Mapping[str, Any]) -> None:
    adapter = exported["adapter"]
    facts = {"folder": exported["folder"], "base model": adapter["base_model"], "scope": adapter["scope"]}
    facts |= {"quantization": exported["dtype"], "criticality above": adapter["thresholds"].get("criticality")}
    print_facts("export", facts)


@with_options(ExportConfig, show)
def command(config: ExportConfig) -> Any:
    """Write an adapter and its base model as a folder of GGUF files, which llama.cpp runs on a laptop."""
    from s2t.export import export

    return export(config)
