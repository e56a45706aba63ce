"""Why a model cannot be loaded, in one line: what is wrong, and what to do. Reads what a library said; loads nothing."""

from __future__ import annotations

import os
from pathlib import Path

from s2t.model.quantization import missing_package


def why_not_loaded(name: str, error: Exception, revision: str | None = None, quantization: str | None = None) -> str:
    """One line for a model that cannot be loaded: what is wrong and what to do."""
    if quantization is not None and isinstance(error, ImportError):
        return missing_package(quantization, error)
    text = " ".join(str(error).split()) or type(error).__name__
    is_folder = os.path.exists(name)
    is_path = name.startswith(("/", ".", "~")) or name.count("/") > 1
    wanted = (
        ("config.json", "tokenizer_config.json")
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "adapter_config.json"))
        else ()
    )
    missing = [file for file in wanted if not Path(name, file).is_file()]
    reasons = {
        f"is a folder without {' and '.join(missing)}; pass one that save_pretrained of a model and its tokenizer wrote.": (
            bool(missing)
        ),
        "needs its own code; review it, then pass --trust-remote-code.": "trust_remote_code" in text,
        "is gated or private; accept its terms on the hub, then run: hf auth login.": any(
            sign in text for sign in ("gated", "401", "403")
        ),
        f"has no revision {revision}; pass a branch, a tag or a commit of its repository.": (
            "not a valid git identifier" in text
        ),
        "has no safetensors weights; convert it first (pickled weights are not loaded).": (
            is_folder and "safetensors" in text
        ),
        "is a folder that does not exist; pass an existing folder or a hub id such as Qwen/Qwen2.5-0.5B-Instruct.": (
            is_path and not is_folder
        ),
        "is not in the cache and the hub cannot be reached; connect once, or pass a folder.": "couldn't connect"
        in text,
        f"cannot be loaded: {text[:200]}": is_folder or "/" in name or "connection" in text.lower(),
        "was not found: give a hub id (owner/name), a folder, or tiny:slm / tiny:llm.": True,
    }
    return f"model {name} {next(reason for reason, applies in reasons.items() if applies)}"
