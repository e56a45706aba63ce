"""An adapter folder becomes a repository of the Hugging Face hub, under which everybody can name it: `--adapter OWNER/NAME`.

Only the files of an adapter go up, after a check that they are the ones that were trained; the card says how to load it by its
name. Tokens are the hub client's business (`hf auth login`, HF_TOKEN) and are never shown.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from s2t.config import PushConfig
from s2t.errors import ConfigError, DataError
from s2t.files import read_json, write_text
from s2t.model.adapter import LORA_FILE, check_weights, read_adapter_config
from s2t.model.card import EVAL_FILE, with_accuracy
from s2t.model.merged import CONFIG_FILE, HUB_ID, PROBLEMS_FILE, SELECTOR_FILE
from s2t.progress import note

FILES = ("adapter_config.json", LORA_FILE, CONFIG_FILE, SELECTOR_FILE, PROBLEMS_FILE, EVAL_FILE, "README.md")
_NEEDED = FILES[:4]
_PLACE = "THIS FOLDER"
_BASE_LINE = re.compile(r"^base_model: .*\n", re.MULTILINE)


def push(config: PushConfig) -> dict[str, Any]:
    """Upload an adapter folder and return the repository's name and address, whether it is private, and the files.

    Raises ModelError for a folder that is no sound adapter, and ConfigError, one line, where the hub refuses or is not there.
    """
    folder = Path(config.adapter)
    adapter = read_adapter_config(folder)
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise DataError(f"adapter {folder} lacks {', '.join(missing)}; copy the folder again, or train again.")
    check_weights(folder, adapter.weights)
    if not (folder / EVAL_FILE).is_file():
        note(f"the card has no accuracies; run s2t eval --adapter {folder} --card, and push again, to put them there.")
    if not _is_of_the_hub(adapter.base_model):
        note(
            f"the base model {adapter.base_model} is not of the hub; its name goes up with the settings, its weights do not."
        )
    with tempfile.TemporaryDirectory(prefix="s2t-push-") as temporary:
        names = _prepare(folder, Path(temporary), config.repo, adapter.base_model)
        return _upload(config, temporary) | {"files": names}


def _prepare(folder: Path, to: Path, repo: str, base_model: str) -> list[str]:
    """The adapter's files, and nothing else that lies there, with a card for the hub; returns their names."""
    names = [name for name in FILES if (folder / name).is_file() or name == "README.md"]
    for name in names:
        if name != "README.md":
            shutil.copyfile(folder / name, to / name)
    write_text(to / "README.md", _card(folder, repo, base_model))
    return names


def _card(folder: Path, repo: str, base_model: str) -> str:
    """The folder's card under its new name, with the accuracies of the last `s2t eval --card`."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else f"# {repo}\n"
    if not _is_of_the_hub(base_model):
        card = _BASE_LINE.sub("", card, count=1)  # the hub refuses names of other places here
    if (folder / EVAL_FILE).is_file():
        card = with_accuracy(card, read_json(folder / EVAL_FILE))
    return card.replace(_PLACE, repo)


def _is_of_the_hub(base_model: str) -> bool:
    return HUB_ID.fullmatch(base_model) is not None and not Path(base_model).exists()


def _upload(config: PushConfig, folder: str) -> dict[str, Any]:
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(config.repo, private=not config.public, exist_ok=True)
        api.upload_folder(repo_id=config.repo, folder_path=folder, commit_message="Upload with s2t")
        is_private = api.repo_info(config.repo).private
    except Exception as error:  # of the hub's client or its HTTP library, which differ between versions
        raise ConfigError(f"{config.repo} cannot be pushed: {_reason(error)}") from error
    return {"repo": config.repo, "url": f"{api.endpoint}/{config.repo}", "private": is_private}


def _reason(error: Exception) -> str:
    """What the hub said, on one line and without any token, and what to do about it."""
    from huggingface_hub import get_token

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join(str(error).split()) or type(error).__name__
    if token := get_token():
        said = said.replace(token, "***")
    said = re.sub(r"hf_\w+", "***", said)[:300]
    next_step = {401: "log in with `hf auth login`", 403: "take a token that may write there, or another --repo"}
    return f"{said.rstrip('.')}; {next_step.get(status or 0, 'check the name, the network and `hf auth login`')}."
