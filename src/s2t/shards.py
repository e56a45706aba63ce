"""The numbered files of a run: whether they are still those that it wrote, none gone, doubled or changed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from s2t.errors import DataError

_SHARD = re.compile(r"(.+)-\d{5,}\.(parquet|json)")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every numbered shard in a folder, by name."""
    return {name: _digest(folder / name) for name in sorted(_names(folder)) if _SHARD.fullmatch(name)}


def check_whole(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise DataError unless the shards are those that a finished run listed in its manifest (older ones list none)."""
    listed = manifest.get("shards")
    if not isinstance(listed, dict):
        return
    kinds = {(match[1], match[2]) for name in listed if (match := _SHARD.fullmatch(name))}
    there = {name for name in _names(folder) for head, end in kinds if _is_alike(name, head, end)}
    for name in sorted(listed.keys() | there):
        if name not in there:
            what = "is gone"
        elif name not in listed:
            what = "was not there"
        elif _digest(folder / name) != listed[name]:
            what = "is not the file that was written"
        else:
            continue
        raise DataError(
            f"{folder} is no longer what s2t {manifest.get('command')} wrote: {name} {what}; copy the folder again, or "
            "remove what does not belong there and rerun the same command."
        )


def _names(folder: Path) -> list[str]:
    return [item.name for item in folder.iterdir()]


def _is_alike(name: str, head: str, end: str) -> bool:
    return name.startswith(f"{head}-") and name.endswith(f".{end}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
