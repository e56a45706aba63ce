"""`s2t export`: an adapter and its base model become a folder of GGUF files that llama.cpp runs, with the selector beside them.

It is a merged folder whose weights are `model.gguf` and `lora.gguf`: the same `s2t_config.json` names every file's sha256 and
loading checks it. Packing moves criticality, so its threshold is set anew on answers of the very file. The folder is written
under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from s2t.config import DecodeConfig, ExportConfig, TaskConfig
from s2t.decode.pair import Pair
from s2t.decode.workload import open_task, requests_for
from s2t.errors import ConfigError, ModelError, S2TError
from s2t.files import versions, write_json, write_text
from s2t.methods.strategies import build_strategy
from s2t.model.adapter import LORA_FILE as PEFT_FILE
from s2t.model.adapter_config import AdapterConfig, check_weights, read_adapter_config
from s2t.model.gguf.file import LORA_FILE, MODEL_FILE, Header, gguf_path, names_gguf, read_header
from s2t.model.gguf.library import llama
from s2t.model.gguf.lora import check_architecture, write_lora
from s2t.model.gguf.selector import GgufSelector, check_scope
from s2t.model.gguf.weights import GgufModel, load_gguf
from s2t.model.gguf.write import pack, write_gguf
from s2t.model.load import load_model
from s2t.model.merged import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    PROBLEMS_FILE,
    SELECTOR_FILE,
    MergedConfig,
    adapter_folder,
    check_target,
    hash_weights,
    written_whole,
)
from s2t.progress import note

_ADAPTER_FILES = (PEFT_FILE, "adapter_config.json", SELECTOR_FILE, PROBLEMS_FILE, "README.md")
_UNPACKED = ("f32",)
_ROWS = 8  # answers written at once for the threshold


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the folder and return what its `s2t_config.json` says; raises ModelError or ConfigError, one line."""
    out = Path(config.out)
    check_target(out, config.overwrite)
    adapter = read_adapter_config(config.adapter)
    check_scope(adapter)
    llama()  # raises where it is missing, before anything is made
    folder = adapter_folder(config.adapter)
    _check_whole(folder, adapter)
    with written_whole(out, "exporting") as part:
        header = _write_model(part, config, adapter)
        check_architecture(header)
        try:
            write_lora(folder, header, part / LORA_FILE)
            loaded, adapter = _write_adapter(part, folder, header, config, adapter)
        except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"adapter {config.adapter} does not fit {adapter.base_model}: {reason}.") from error
        document = _describe(part, loaded, adapter)
        write_text(part / "README.md", _readme(document, loaded, out))
        write_json(part / CONFIG_FILE, document.as_json())
    return {"folder": str(out)} | document.as_json()


def _check_whole(folder: Path, adapter: AdapterConfig) -> None:
    """Raise ModelError unless the adapter's files are there, and are those that were saved."""
    for name in (PEFT_FILE, "adapter_config.json", SELECTOR_FILE):
        if not (folder / name).is_file():
            raise ModelError(f"adapter {folder} is damaged: {name} is missing.")
    check_weights(folder, adapter.weights)


def _write_model(part: Path, config: ExportConfig, adapter: AdapterConfig) -> Header:
    """The base's file: taken, or made of the model that the adapter was trained on."""
    name, target = config.base_gguf, part / MODEL_FILE
    if name is None and config.slm is None and names_gguf(adapter.base_model):
        name = adapter.base_model
    if name is not None:
        return _taken(gguf_path(name), target, config.quantization)
    loaded = load_model(config.slm or adapter.base_model, device="cpu", trust_remote_code=config.trust_remote_code)
    if loaded.fingerprint != adapter.base_fingerprint:
        raise ModelError(
            f"adapter {config.adapter} was trained on {adapter.base_model} (weights {adapter.base_fingerprint}), not on "
            f"{loaded.name} (weights {loaded.fingerprint}); pass --slm {adapter.base_model}."
        )
    dense = part / "dense.gguf"
    write_gguf(loaded, dense)
    return _packed(dense, target, config.quantization or "q4_k_m")


def _packed(source: Path, target: Path, quantization: str) -> Header:
    """A dense file of our own as it is asked for; it does not stay."""
    if quantization in _UNPACKED:
        os.replace(source, target)
    else:
        pack(source, target, quantization)
        source.unlink()
    return read_header(target)


def _taken(source: Path, target: Path, quantization: str | None) -> Header:
    """A given file as it is, or packed where it is not yet and a quantization is asked for."""
    header = read_header(source)
    own = header.quantization.lower()
    asked = quantization or own
    if asked == own or {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(asked) == own:
        shutil.copyfile(source, target)
        return read_header(target)
    if own not in ("float32", "float16", "bfloat16"):
        raise ConfigError(
            f"{source} is {header.quantization} already, and packing it once more to {asked} would lose twice; leave out "
            "--quantization, or pass a file in f16 or f32."
        )
    pack(source, target, asked)
    return read_header(target)


def _write_adapter(
    part: Path, folder: Path, header: Header, config: ExportConfig, adapter: AdapterConfig
) -> tuple[GgufModel, AdapterConfig]:
    """The adapter's own files beside the model, with the threshold of this file; the model as it will be loaded."""
    home = part / ADAPTER_FOLDER
    home.mkdir()
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, home / name)
    loaded = load_gguf(adapter.base_model, header, threads=config.threads)
    selector = GgufSelector(loaded, adapter, home, part / LORA_FILE)
    adapter = replace(adapter, reserved_ids=selector.reserved.all)
    if config.calibration_problems and adapter.trigger_rate is not None:
        found = _threshold(Pair(loaded, None, selector, _ROWS), config, adapter, adapter.trigger_rate)
        adapter = replace(adapter, thresholds={**adapter.thresholds, "criticality": found})
    write_json(home / CONFIG_FILE, asdict(adapter))
    return loaded, adapter


def _threshold(pair: Pair, config: ExportConfig, adapter: AdapterConfig, rate: float) -> float:
    """Criticality that a share `rate` of the steps of the file's own greedy answers passes."""
    try:
        if adapter.task is None:
            raise ConfigError("the adapter names no task")
        settings = TaskConfig(task=adapter.task.split(";")[0])
        task = open_task(settings, adapter.base_model)
        problems = task.problems("calibration", config.calibration_problems, 0)
    except S2TError as error:
        raise ConfigError(f"the threshold cannot be set anew ({error}); or pass --calibration-problems 0.") from error
    reading = replace(build_strategy("s2t-local", DecodeConfig(threshold=1.0), {}), threshold=float("inf"))
    done = pair.write(reading, requests_for(pair, task, problems), config.calibration_tokens, keep_steps=True)
    values = [
        step.value for sequence in done for step in sequence.steps[adapter.warmup_steps :] if step.value is not None
    ]
    if not values:
        raise ConfigError(
            f"the threshold cannot be set anew: no answer has a token behind the first {adapter.warmup_steps}; pass "
            "--calibration-problems 0, or pack to more bits."
        )
    found = float(np.quantile(values, 1 - rate))
    before = adapter.thresholds.get("criticality")
    note(
        f"criticality triggers {rate:.1%} of {len(values):,} steps above {found:.4f}"
        + (f" (before: {before:.4f})" if before is not None else "")
    )
    return found


def _describe(part: Path, loaded: GgufModel, adapter: AdapterConfig) -> MergedConfig:
    return MergedConfig(
        adapter=json.loads(json.dumps(asdict(adapter))),
        reserved=loaded.reserved,
        vocab_size=loaded.vocab_size,
        dtype=loaded.header.quantization,
        weights=hash_weights(part),
        versions=versions() | {"llama-cpp-python": _version()},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _version() -> str:
    from importlib.metadata import version

    return version("llama-cpp-python")


def _readme(document: MergedConfig, loaded: GgufModel, out: Path) -> str:
    adapter = document.adapter
    front = {
        "pipeline_tag": "text-generation",
        "base_model": adapter["base_model"],
        "tags": ["select-to-think", "gguf"],
    }
    settings = {
        "quantization": document.dtype,
        "file": f"{loaded.header.num_bytes / 2**20:.0f} MiB",
        "memory beside it": f"{loaded.cache_bytes(4096) / 2**20:.0f} MiB for 4,096 tokens",
        "context": loaded.context_length,
        "readout": adapter["readout"],
        "scope": adapter["scope"],
        "thresholds": json.dumps(adapter["thresholds"]),
        "trained on": adapter["task"],
        "reference (LLM)": adapter["llm"],
    }
    rows = "".join(f"| {key} | {value} |\n" for key, value in settings.items() if value is not None)
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return _README.format(
        front=head, base=Path(adapter["base_model"]).name, folder=out.name, settings=rows, version=document.s2t_version
    )


_README = """---
{front}
---

# {base} with S2T-LOCAL, for llama.cpp

A small model that chooses among its own candidates where it is likely to go wrong, with no larger model at inference.
`model.gguf` is the base model, unchanged: any llama.cpp program runs it, without the selection. `lora.gguf` acts where the model
reads its last token once more before it chooses, and `s2t_adapter` says where and how.

## Run it

```bash
pip install -e ".[gguf,serve]"   # in a clone of Select to Think; compiles llama.cpp: some minutes, with cmake and a C++ compiler
s2t generate --slm {folder} "What is 12 * 13?"
s2t serve --slm {folder}        # an OpenAI-compatible server, and a playground at http://127.0.0.1:8000
```

## Settings

| setting | value |
| --- | --- |
{settings}
Made by s2t {version}; `s2t_config.json` has every setting and the sha256 of every weights file. Method: arXiv 2604.26940.
"""
