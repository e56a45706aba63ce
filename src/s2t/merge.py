"""`s2t merge`: an adapter and its base model become one folder that loads like any causal LM and brings its selector.

Scope `always`: LoRA, bins and criticality rows are in the weights. Scopes `step` and `candidates`: the weights are the base's
and the adapter lies beside them. Scope `stream`: the same, with the rows it reads (readout `rank`: those of criticality
alone) in the base's weights. The folder is written under another name and renamed when it is whole. Decodes nothing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from s2t.config import MergeConfig
from s2t.errors import ConfigError, ModelError
from s2t.files import load_run, read_json, versions, write_bytes, write_json, write_text
from s2t.model.adapter import (
    BRANCH_SCOPES,
    LORA_FILE,
    AdapterConfig,
    SelectorAdapter,
    load_adapter,
    read_adapter_config,
)
from s2t.model.card import EVAL_FILE, accuracy_section, measured
from s2t.model.load import load_model, quiet
from s2t.model.loaded import Head, LoadedModel
from s2t.model.merged import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    PROBLEMS_FILE,
    SELECTOR_FILE,
    MergedConfig,
    adapter_folder,
    check_target,
    hash_weights,
    sha256,
    written_whole,
)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADAPTER_FILES = (LORA_FILE, "adapter_config.json", SELECTOR_FILE, PROBLEMS_FILE, "README.md", CONFIG_FILE)

GENERATE = '''"""S2T-LOCAL for `model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)`; the code is in s2t."""


def generate(model, **arguments):
    from s2t.integrations.transformers import generate_merged

    return generate_merged(model, **arguments)
'''


def merge(config: MergeConfig) -> dict[str, Any]:
    """Write the merged folder and return what its `s2t_config.json` says; raises ModelError or ConfigError, one line."""
    out = Path(config.out)
    check_target(out, config.overwrite)
    adapter = read_adapter_config(config.adapter)
    folder = adapter_folder(config.adapter)
    found = _measured(config.eval, folder)
    name = config.slm or adapter.base_model
    loaded = load_model(name, device="cpu", trust_remote_code=config.trust_remote_code)
    attached = load_adapter(folder, loaded, with_peft=True)
    with written_whole(out, "merging") as part:
        dtype = _write_model(part, loaded, attached, config.dtype)
        _write_rest(part, folder, attached)
        document = _describe(part, attached, dtype, found)
        _write_texts(part, adapter, document)
        write_json(part / CONFIG_FILE, document.as_json())
    return {"folder": str(out)} | document.as_json()


# Weights


def _write_model(folder: Path, loaded: LoadedModel, adapter: SelectorAdapter, dtype: str) -> str:
    """Model, generation config and tokenizer as transformers saves them; returns the dtype of the weights."""
    model: Any = loaded.model
    num_rows = model.get_output_embeddings().weight.shape[0]
    kinds = {name.replace(".base_layer.", "."): parameter.dtype for name, parameter in model.named_parameters()}
    if adapter.scope == "always":
        for parameter in model.parameters():
            parameter.data = parameter.data.float()  # merged in float32, rounded once
        adapter.act(True)
        model = _merged(adapter)
    else:
        adapter.detach()
    rows = _rows(adapter)
    if rows:
        _write_rows(model, rows, max(adapter.reserved.all) + 1)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(_DTYPES.get(dtype) or kinds[name])
    try:
        with quiet():
            model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{loaded.name} cannot be saved: {' '.join(str(error).split())[:200]}") from error
    if rows:
        size = model.get_output_embeddings().weight.shape[0]
        _forbid(folder, {*adapter.reserved.all, *range(num_rows, size)})
    return str(model.dtype).removeprefix("torch.")


def _merged(adapter: SelectorAdapter) -> Any:
    try:
        return adapter.peft_model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # not finite
        raise ModelError(f"the adapter cannot be merged: {' '.join(str(error).split())[:200]}") from error


def _rows(adapter: SelectorAdapter) -> dict[tuple[int, ...], Tensor]:
    """What of the selector becomes output rows: bins (of readout `bins`) and yes, no (where criticality is read from them)."""
    reserved, selector = adapter.reserved, adapter.selector
    rows: dict[tuple[int, ...], Tensor] = {}
    if adapter.scope not in BRANCH_SCOPES and not adapter.ranks:
        rows[reserved.bins] = selector.bins
    if adapter.scope not in BRANCH_SCOPES and adapter.config.criticality == "reserved":
        rows[reserved.criticality] = selector.yes_no
    return rows


@torch.no_grad()
def _write_rows(model: Any, rows: dict[tuple[int, ...], Tensor], num_needed: int) -> None:
    """Put bins (and yes, no) into the output rows of the reserved ids, as they are: `hidden @ weight[ids].T` reads them.

    Where input and output embeddings are tied the input rows of those ids change as well, which is harmless: no tokenizer
    writes them and no decoder accepts them. A scale or a softcap that a model puts on its logits comes after these rows; the
    bins were trained without, so who reads them through the model's own logits has to undo it (`head` in s2t_config.json).
    """
    missing = num_needed - model.get_output_embeddings().weight.shape[0]
    if missing > 0:
        _add_rows(model, missing)
    head = model.get_output_embeddings()
    for ids, values in rows.items():
        head.weight[list(ids)] = values.to(head.weight)
        if getattr(head, "bias", None) is not None:
            head.bias[list(ids)] = 0.0


def _add_rows(model: Any, count: int) -> None:
    """Rows for ids past the embedding's end; zero, since transformers would draw them at random."""
    size = model.get_output_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + count, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        layer.weight[size:] = 0.0


def _forbid(folder: Path, ids: set[int]) -> None:
    """Have plain `generate` leave reserved ids and added rows out: their logits are bins, not chances of a token."""
    path = folder / "generation_config.json"
    settings = read_json(path)
    settings["suppress_tokens"] = sorted({*(settings.get("suppress_tokens") or ()), *ids})
    write_json(path, settings)


def _write_rest(folder: Path, source: Path, adapter: SelectorAdapter) -> None:
    """The adapter beside the base's weights, or (`always`) the parts of it that are no rows."""
    if adapter.scope != "always":
        (folder / ADAPTER_FOLDER).mkdir()
        for name in _ADAPTER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / ADAPTER_FOLDER / name)
        return
    head = {name: tensor for name, tensor in adapter.selector.state_dict().items() if name.startswith("head.")}
    if head:
        write_bytes(folder / SELECTOR_FILE, save({name: _plain(tensor) for name, tensor in head.items()}))
    if (source / PROBLEMS_FILE).is_file():
        shutil.copyfile(source / PROBLEMS_FILE, folder / PROBLEMS_FILE)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().cpu()


# Texts


def _describe(folder: Path, adapter: SelectorAdapter, dtype: str, found: dict[str, Any] | None) -> MergedConfig:
    head = Head(adapter.base_model)
    return MergedConfig(
        adapter=json.loads(json.dumps(asdict(adapter.config))),
        reserved=adapter.reserved,
        vocab_size=adapter.loaded.vocab_size,
        dtype=dtype,
        weights=hash_weights(folder),
        head={"scale": head.scale / head.divisor, "softcap": head.softcap},
        eval=found,
        versions=versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _write_texts(folder: Path, adapter: AdapterConfig, document: MergedConfig) -> None:
    write_text(folder / "custom_generate" / "generate.py", GENERATE)
    needs = "s2t>=" + document.s2t_version + ("\npeft>=0.17" if adapter.scope != "always" else "")
    write_text(folder / "custom_generate" / "requirements.txt", needs + "\n")
    write_text(folder / "README.md", _card(adapter, document))


def _measured(run: str | None, adapter: Path) -> dict[str, Any] | None:
    """Accuracies of an eval run, which must have measured this very adapter; without one, those of its own card."""
    if run is None:
        return read_json(adapter / EVAL_FILE) if (adapter / EVAL_FILE).is_file() else None
    config = load_run(run, "eval")["config"]
    other = config.get("adapter")
    if other is None or not _same_adapter(adapter_folder(other), adapter):
        raise ConfigError(f"eval run {run} measured adapter {other}, not {adapter}; pass the run of this adapter.")
    return measured(read_json(Path(run) / "summary.json"))


def _same_adapter(left: Path, right: Path) -> bool:
    files = [folder / name for name in (LORA_FILE, SELECTOR_FILE, CONFIG_FILE) for folder in (left, right)]
    if not all(path.is_file() for path in files):
        return left.resolve() == right.resolve()
    digests = [sha256(path) for path in files]
    return digests[::2] == digests[1::2]


def _card(adapter: AdapterConfig, document: MergedConfig) -> str:
    """The model card: front matter of the hub, how to run it, measured accuracies, settings."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": adapter.base_model,
        "tags": ["select-to-think", "s2t"],
    }
    head = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    reserved = document.reserved
    read = reserved.bins if adapter.readout == "bins" else ()
    read += reserved.criticality if adapter.criticality == "reserved" else ()
    settings = {
        "readout": adapter.readout,
        "scope": adapter.scope,
        "criticality": adapter.criticality,
        "thresholds": adapter.thresholds,
        "candidates": adapter.num_candidates,
        "bins": adapter.num_bins if adapter.readout == "bins" else None,
        "adapter weight": adapter.adapter_weight,
        "reserved ids": f"{min(read)} to {max(read)} ({reserved.kind})" if read else None,
        "dtype": document.dtype,
        "trained on": adapter.task,
        "reference (LLM)": adapter.llm,
    }
    rows = "".join(f"| {key} | {_cell(value)} |\n" for key, value in settings.items() if value is not None)
    return _CARD.format(
        front=head,
        base=adapter.base_model,
        what=_WHAT[adapter.scope if read or adapter.scope != "stream" else "stream, no rows"],
        accuracy=accuracy_section(document.eval),
        settings=rows,
        version=document.s2t_version,
    )


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_WHAT = {
    "always": "The adapter is merged into the weights; the scores and, where criticality is read from reserved ids, the "
    "criticality are output rows of ids that no text uses (never to be generated; plain `generate` leaves them out).",
    "step": "The weights are those of the base model, unchanged; the adapter in `s2t_adapter` acts where the model reads a token "
    "once more before it chooses, so without s2t this folder is the base model.",
    "candidates": "The weights are those of the base model, unchanged; the adapter in `s2t_adapter` acts on candidate tokens "
    "alone, so without s2t this folder is the base model.",
    "stream": "The weights are those of the base model but for the output rows of ids that no text uses, which hold what "
    "the selector reads from them; the adapter in `s2t_adapter` is read beside it. A vLLM server takes it as a LoRA.",
    "stream, no rows": "The weights are those of the base model, unchanged; the adapter in `s2t_adapter` is read beside it, so "
    "without s2t this folder is the base model. A vLLM server takes it as a LoRA.",
}
_CARD = """---
{front}
---

# {base} with S2T-LOCAL

{base} that chooses among its own candidates where it is likely to go wrong, with no larger model at inference.
{what}

```python
import s2t

print(s2t.load("THIS FOLDER").generate("What is 12 * 13?").text)
```

In transformers: `model.generate(**inputs, custom_generate="THIS FOLDER", trust_remote_code=True)` (needs s2t installed).

{accuracy}## Settings

| setting | value |
| --- | --- |
{settings}
Made by s2t {version}; `s2t_config.json` has every setting and the sha256 of every weights file. Method: arXiv 2604.26940.
"""
