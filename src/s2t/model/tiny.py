"""The embedded models: an SLM and an LLM that make a pair, and two alternative SLMs, shipped with the package.

`tiny:slm` is the default small model, `tiny:llm` the reference; see the model card beside the weights for
how each was made. Works offline; nothing here touches the network. Files that several of them share (the tokenizer) stand in the
package once.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from functools import cache
from importlib import resources
from pathlib import Path

from s2t.errors import ModelError

PREFIX = "tiny:"
ALIASES = {"slm": "slm-unfiltered"}
_ASSETS, _SHARED = Path(str(resources.files("s2t.model") / "assets")), "shared"
_ONE_AT_A_TIME = threading.Lock()
NAMES = ("slm", "slm-unfiltered", "slm-numbers", "slm-small", "llm")


def is_embedded(name: str) -> bool:
    """True for names of the embedded pair, known or not."""
    return name.startswith(PREFIX)


def embedded_path(name: str) -> Path:
    """Folder of an embedded checkpoint, there as long as this process; raises ModelError for a name that does not exist."""
    model = _model(name)
    with _ONE_AT_A_TIME:
        return _whole(model)


@cache
def embedded_template() -> str:
    """The chat template of all embedded models."""
    return (_ASSETS / _SHARED / "chat_template.jinja").read_text(encoding="utf-8")


def model_card_note(name: str) -> str:
    """The first paragraph of the checkpoint's model card: in plain words, how it was made."""
    text = (_ASSETS / _model(name) / "README.md").read_text(encoding="utf-8")
    body = text.split("---", 2)[2] if text.startswith("---") else text
    paragraphs = [part.strip() for part in body.split("\n\n") if part.strip() and not part.strip().startswith("#")]
    return " ".join(paragraphs[0].split())


def _model(name: str) -> str:
    short = name.removeprefix(PREFIX)
    if short not in NAMES:
        raise ModelError(f"no embedded model {name!r}; there are {', '.join(PREFIX + known for known in NAMES)}.")
    return ALIASES.get(short, short)


@cache
def _whole(model: str) -> Path:
    """A folder with the model's own files and, where it has none of that name, the shared ones; links, or copies without them."""
    folder = Path(_temporary().name) / model
    folder.mkdir()
    files = {file.name: file for part in (_SHARED, model) for file in (_ASSETS / part).iterdir()}
    for name, file in files.items():
        try:
            (folder / name).symlink_to(file)
        except OSError:  # a system or a user that may not make links
            shutil.copyfile(file, folder / name)
    return folder


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    """Where whole folders are put together; removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="s2t-embedded-", ignore_cleanup_errors=True)
