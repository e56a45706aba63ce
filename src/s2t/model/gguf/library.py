"""llama.cpp by way of llama-cpp-python's low-level functions: found, checked, and silenced, in one place.

Its own structs and its own library alone: another library behind these bindings would read other fields in silence.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from s2t.errors import ModelError

PACKAGE = "llama-cpp-python"
INSTALL = "pip install 's2t[gguf]' (it compiles for some minutes and needs cmake and a C++ compiler)"
_OLDEST = (0, 3, 36)  # whose functions and structs these are; checked with this version
_NEEDED = (
    *("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_decode", "llama_tokenize"),
    *("llama_set_adapters_lora", "llama_adapter_lora_init", "llama_set_embeddings", "llama_get_embeddings"),
    *("llama_memory_seq_cp", "llama_memory_seq_rm", "llama_state_seq_get_data", "llama_state_seq_set_data"),
)
_ERROR = 4  # ggml's level
_last_error: list[str] = []


def has_llama() -> bool:
    """Whether llama-cpp-python is installed, sound or not; imports nothing."""
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@cache
def llama() -> Any:
    """The module of low-level functions, started and silent; raises ModelError, one line, where it cannot be used."""
    if not has_llama():
        raise ModelError(f"--engine llama.cpp needs the package {PACKAGE}; {INSTALL}, or pass --engine torch.")
    version = importlib.metadata.version(PACKAGE)
    if _numbers(version) < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise ModelError(f"{PACKAGE} is {version}, and {oldest} or newer is needed; {INSTALL}.")
    if os.environ.get("LLAMA_CPP_LIB_PATH"):
        raise ModelError(
            "LLAMA_CPP_LIB_PATH names another llama.cpp library, whose structs may differ; unset it, or pass --engine torch."
        )
    try:
        found = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError, FileNotFoundError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{PACKAGE} {version} cannot be used here: {reason}; build it here: {INSTALL}.") from error
    if lacking := [name for name in _NEEDED if not hasattr(found, name)]:
        raise ModelError(f"{PACKAGE} {version} has no {lacking[0]}; {INSTALL}.")
    found.llama_log_set(_log(found), ctypes.c_void_p(0))
    found.llama_backend_init()
    torch.set_num_threads(1)  # torch's own threads would spin beside llama.cpp's, and have next to nothing to do
    return found


def last_error() -> str:
    """What llama.cpp said last when something failed; empty where it said nothing."""
    return _last_error[0] if _last_error else ""


@cache
def _log(found: Any) -> Any:
    """Keeps errors, and is itself kept as long as the process."""

    def keep(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            _last_error[:] = [" ".join(text.decode("utf-8", "replace").split())[:200]]

    return found.llama_log_callback(keep)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def default_threads() -> int:
    """The physical cores that this process may use and that no other keeps busy now; at least one.

    llama.cpp's threads wait for each other many times a token, so one that has to share its core holds up all of them.
    """
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = (os.cpu_count() or 1) - _num_busy()
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, free))


def _num_busy() -> int:
    """Threads of others that run or want to, the median of a tenth of a second; 0 where the system does not tell."""
    counts = []
    for _ in range(5):
        try:
            counts.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)  # without this one
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(0.02)
    return max(0, sorted(counts)[2])
