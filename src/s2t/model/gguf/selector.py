"""What selects beside a GGUF model: the LoRA in llama.cpp, and the readings in float32 from states that hold their logits."""

from __future__ import annotations

import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from s2t.core.rule import criticality, expected_bin
from s2t.errors import ModelError
from s2t.model.adapter import BRANCH_SCOPES, SelectorHeads, SelectorReader, reserved_of
from s2t.model.adapter_config import AdapterConfig, check_weights, read_adapter_config
from s2t.model.gguf.file import LORA_FILE
from s2t.model.gguf.library import last_error, llama
from s2t.model.gguf.lora import write_lora
from s2t.model.gguf.weights import GgufModel
from s2t.model.merged import ADAPTER_FOLDER, SELECTOR_FILE, adapter_folder
from s2t.progress import note


class GgufSelector(SelectorReader):
    """Scores and criticality from states [..., H + V]; `lora` is llama.cpp's adapter, as long as the model lives."""

    def __init__(self, loaded: GgufModel, config: AdapterConfig, folder: Path, lora_file: Path) -> None:
        self.config, self.loaded, self.base_model = config, loaded, None
        self.reserved = reserved_of(config, loaded)
        self.width = loaded.weights.width
        self.selector = SelectorHeads(config, self.width)
        self.selector.load_state_dict(load_file(folder / SELECTOR_FILE))
        self.selector.float().eval().requires_grad_(False)
        self.lora = llama().llama_adapter_lora_init(loaded.weights.pointer, str(lora_file).encode())
        if not self.lora:
            raise ModelError(
                f"llama.cpp cannot read the adapter {folder} beside {loaded.name}: {last_error() or 'it gives no reason'}; "
                f"it was trained on {config.base_model}."
            )

    def expected(self, hidden: Tensor) -> Tensor:
        """Expected bin of candidates from their states; [..., H + V] -> [...], in [0, 1]."""
        return expected_bin(self.selector.bin_logits(hidden[..., : self.width]))

    def readings(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """log p_A over K candidates, or e / temperature; [n, 1 or K, H + V], [n, K] -> [n, K]."""
        if self.ranks:
            return hidden[:, 0, self.width :].gather(-1, ids).log_softmax(-1)
        return self.expected(hidden) / self.config.score_temperature

    def criticality(self, hidden: Tensor) -> Tensor:
        """Estimate in [0, 1] that the next token is a divergence point; [..., H + V] -> [...]."""
        return criticality(self.selector.criticality_logits(hidden[..., : self.width]))


def load_gguf_selector(adapter: str | Path | None, loaded: GgufModel) -> GgufSelector | None:
    """What selects beside this model: an adapter folder, else what the model's folder was exported with, else nothing.

    Raises ModelError, one line, for a folder that is damaged, or an adapter that llama.cpp cannot run.
    """
    if adapter is None and loaded.merged is None:
        return None
    if adapter is None:
        assert loaded.merged is not None
        home = Path(loaded.merged.path)
        return _loaded(home / ADAPTER_FOLDER, loaded, home / LORA_FILE)
    own = read_adapter_config(adapter)
    if loaded.merged is not None and own.base_fingerprint != loaded.fingerprint:
        raise ModelError(
            f"adapter {adapter} was trained on {own.base_model} (weights {own.base_fingerprint}), not on the base of "
            f"{loaded.name} (weights {loaded.fingerprint}); export it with that base."
        )
    note(
        f"adapter {adapter} was measured on {own.base_model}, and {loaded.name} rounds its weights; "
        "`s2t export` sets the threshold for the file"
    )
    with tempfile.TemporaryDirectory(prefix="s2t-lora-") as folder:
        path = Path(folder) / LORA_FILE
        write_lora(adapter_folder(adapter), loaded.header, path)
        return _loaded(adapter_folder(adapter), loaded, path)


def _loaded(folder: Path, loaded: GgufModel, lora_file: Path) -> GgufSelector:
    config = read_adapter_config(folder)
    check_scope(config)
    check_weights(folder, config.weights)
    try:
        return GgufSelector(loaded, config, folder, lora_file)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} is damaged: {' '.join(str(error).split())[:200]}.") from error


def check_scope(config: AdapterConfig) -> None:
    """Raise ModelError for an adapter whose scope llama.cpp cannot run."""
    if config.scope not in BRANCH_SCOPES:
        raise ModelError(
            f"llama.cpp runs adapters of scope {' and '.join(BRANCH_SCOPES)}, and this one has scope {config.scope}; pass "
            "--engine torch, or train one with --adapter-scope step."
        )
