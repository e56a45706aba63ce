"""Style and script that pages with tokens share: the report, one file with everything inside, and the server's playground."""

from __future__ import annotations

from importlib import resources


def source(name: str) -> str:
    """The text of `tokens.css` or `tokens.js`."""
    return resources.files("s2t.web").joinpath(name).read_text(encoding="utf-8")
