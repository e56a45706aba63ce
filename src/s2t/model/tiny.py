"""The embedded models: an SLM and an LLM that make a pair, and two alternative SLMs, shipped with the package.

`tiny:slm` is the default small model, `tiny:llm` the reference; see the model card beside the weights for
how each was made. Works offline; nothing here touches the network.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from s2t.errors import ModelError

PREFIX = "tiny:"
ALIASES = {"slm": "slm-unfiltered"}
NAMES = ("slm", "slm-unfiltered", "slm-numbers", "slm-small", "llm")


def is_embedded(name: str) -> bool:
    """True for names of the embedded pair, known or not."""
    return name.startswith(PREFIX)


def embedded_path(name: str) -> Path:
    """Folder of an embedded checkpoint; raises ModelError for a name that does not exist."""
    short = name.removeprefix(PREFIX)
    if short not in NAMES:
        raise ModelError(f"no embedded model {name!r}; there are {', '.join(PREFIX + known for known in NAMES)}.")
    folder = resources.files("s2t.model") / "assets" / ALIASES.get(short, short)
    return Path(str(folder))


def model_card_note(name: str) -> str:
    """The first paragraph of the checkpoint's model card: in plain words, how it was made."""
    text = (embedded_path(name) / "README.md").read_text(encoding="utf-8")
    body = text.split("---", 2)[2] if text.startswith("---") else text
    paragraphs = [part.strip() for part in body.split("\n\n") if part.strip() and not part.strip().startswith("#")]
    return " ".join(paragraphs[0].split())
