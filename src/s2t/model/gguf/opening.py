"""Which engine runs a model: a GGUF file goes to llama.cpp or to torch, everything else to torch; the loop sees one interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from s2t.errors import ConfigError
from s2t.model.adapter import SelectorReader, load_selector, selector_config
from s2t.model.gguf.file import Header, find_gguf
from s2t.model.gguf.library import INSTALL, has_llama
from s2t.model.load import load_model, one_line
from s2t.model.loaded import LoadedModel
from s2t.model.merged import check_revision, local_folder, open_merged
from s2t.model.tiny import is_embedded
from s2t.progress import note

_TORCH_ALONE = {"device_map": None, "quantization": None, "trust_remote_code": False, "execution": "auto"}


def open_model(
    name: str,
    options: dict[str, Any],
    engine: str = "torch",
    threads: int = 0,
    context: int = 0,
    adapter: str | None = None,
) -> LoadedModel:
    """Load a model for the engine that is asked for: torch, llama.cpp, or auto, which is llama.cpp for a GGUF file where it is
    installed and runs the adapter. `options` are those of `load_model`.

    Raises as `load_model`, and ConfigError for what llama.cpp cannot do, by name.
    """
    revision = options.get("revision")
    check_revision(name, revision)
    header = None if engine == "torch" or is_embedded(name) else find_gguf(local_folder(name, revision), revision)
    why = _why_not(name, header, options, adapter)
    if engine == "llama.cpp" and why is not None:
        raise ConfigError(f"--engine llama.cpp: {why}.")
    if header is None or engine == "torch" or why is not None:
        if header is not None:
            note(f"{name} is unpacked and runs on torch, since {why}")
        return load_model(name, **options)
    from s2t.model.gguf.weights import load_gguf

    with one_line(name, revision):
        merged = open_merged(local_folder(name, revision))
        return load_gguf(name, header, merged, options.get("dtype", "auto"), threads, context)


def _why_not(name: str, header: Header | None, options: dict[str, Any], adapter: str | None) -> str | None:
    """Why llama.cpp cannot run a model, in words; None where it can."""
    if header is None:
        return f"it runs GGUF files, and {name} is none; pass --engine torch, or a file"
    given = [key for key, default in _TORCH_ALONE.items() if options.get(key, default) != default]
    if given:
        return f"it takes no {given[0]}; leave it out, or pass --engine torch"
    if options.get("device", "auto") not in ("auto", "cpu"):
        return f"it runs on the CPU here, not on {options['device']}; leave out --device, or pass --engine torch"
    selector = selector_config(adapter, name, options.get("revision"))
    if selector is not None and selector.scope not in ("step", "candidates"):
        return f"it runs adapters of scope step and candidates, and this one has scope {selector.scope}; pass --engine torch"
    if not has_llama():
        return f"llama-cpp-python is not installed: {INSTALL}"
    return None


def open_selector(adapter: str | Path | None, loaded: LoadedModel) -> SelectorReader | None:
    """As `load_selector`, for the engine that the model was loaded for."""
    if loaded.states_hold_logits:
        from s2t.model.gguf.selector import load_gguf_selector

        found: Any = loaded
        return load_gguf_selector(adapter, found)
    return load_selector(adapter, loaded)
