"""The selector adapter: LoRA weights, reserved output rows, a criticality reading, and the metadata that explains them.

On disk it is a PEFT adapter folder plus `s2t_selector.safetensors` and `s2t_config.json`; loading refuses
a base model whose weights are not those it was trained on. A merged folder (`s2t merge`) has the same readings in the
model itself. Knows nothing of decoding or losses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from s2t import __version__
from s2t.core.bins import candidate_score, expected_bin
from s2t.errors import ModelError
from s2t.files import read_json, write_bytes, write_json, write_text
from s2t.model.load import LoadedModel
from s2t.model.lora import import_peft, lora_parameters, new_lora, quiet_peft
from s2t.model.merged import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    PROBLEMS_FILE,
    SELECTOR_FILE,
    is_merged,
    local_folder,
    problem_hashes,
    read_merged,
)
from s2t.model.reserved import ReservedIds

LORA_FILE = "adapter_model.safetensors"  # PEFT's name
_ATTACHED = "_s2t_adapter"


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter was trained on and how it is read; `s2t_config.json`."""

    base_model: str
    base_fingerprint: str
    llm: str | None = None
    task: str | None = None
    scope: str = "candidates"
    num_candidates: int = 8
    num_bins: int = 16
    score_temperature: float = 0.1
    prior_weight: float = 1.0
    criticality: str = "head"
    head_size: int = 64
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    thresholds: dict[str, float] = field(default_factory=dict)
    """Per trigger name, in the trigger's own unit."""
    trigger_rate: float | None = None
    warmup_steps: int = 3
    split_hashes: dict[str, str] = field(default_factory=dict)
    """Digest of the sorted problem hashes of each split that was used."""
    heldout_templates: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    s2t_version: str = __version__


class SelectorReader:
    """What the loop reads from hidden states: scores of candidates, and criticality; of an adapter or a merged model."""

    def __init__(self, loaded: LoadedModel, config: AdapterConfig, base_model: Any, reserved: ReservedIds) -> None:
        self.config, self.loaded, self.base_model, self.reserved = config, loaded, base_model, reserved
        head: Any = loaded.model.get_output_embeddings()
        self.selector = Selector(config, int(head.weight.shape[1])).to(loaded.device)

    @property
    def scope(self) -> str:
        return self.config.scope

    def act(self, on: bool) -> None:
        """Switch the LoRA weights on or off for the forwards that follow; merged ones are always on."""

    def acting_from(self, first: int, num_tokens: int) -> AbstractContextManager[None]:
        """Let the LoRA act on the tokens from place `first` of a flat forward of N on, and on no others."""
        raise NotImplementedError

    def expected(self, hidden: Tensor) -> Tensor:
        """Expected bin of candidates from their hidden states; [..., H] -> [...], in [0, 1]."""
        return expected_bin(self.selector.bin_logits(hidden))

    def scores(self, hidden: Tensor, slm_logprobs: Tensor) -> Tensor:
        """Selection scores; [..., K, H], [..., K] -> [..., K]. Source: METHOD section 3."""
        config = self.config
        return candidate_score(
            self.selector.bin_logits(hidden), slm_logprobs, config.score_temperature, config.prior_weight
        )

    def criticality(self, hidden: Tensor) -> Tensor:
        """Estimate in [0, 1] that the next token is a divergence point, from the state it is read from; [..., H] -> [...]."""
        return torch.sigmoid(self.selector.criticality_logits(hidden))


class SelectorAdapter(SelectorReader):
    """An adapter attached to a base model; `act` switches its LoRA on and off, scores and criticality read hidden states."""

    def __init__(self, loaded: LoadedModel, config: AdapterConfig, peft_model: Any = None) -> None:
        self.peft_model = peft_model if peft_model is not None else _new_peft_model(loaded, config)
        super().__init__(loaded, config, self.peft_model.get_base_model(), loaded.reserved_for(config.num_bins))
        self._layers = _tuner_layers(self.base_model)
        self._acting: bool | None = None
        self.base_model.__dict__[_ATTACHED] = self
        self.act(False)

    def act(self, on: bool) -> None:
        """Switch the LoRA weights on or off for the forwards that follow."""
        if on == self._acting:
            return
        for layer in self._layers:
            layer.enable_adapters(on)
            if on:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = (
                    layer.base_layer.__call__
                )  # PEFT's own way to the base layer costs a tenth of a small step
        self._acting = on

    @contextmanager
    def acting_from(self, first: int, num_tokens: int) -> Iterator[None]:
        """Let the LoRA act on the tokens from place `first` of a flat forward of N on, and on no others."""
        assert not self._acting
        hooks = [layer.register_forward_hook(partial(_add_lora, first, num_tokens)) for layer in self._layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def detach(self) -> None:
        """Give the base model its own layers back; the adapter is of no further use."""
        self.act(True)  # PEFT hands back what it wrapped
        self.peft_model.unload()
        self.base_model.__dict__.pop(_ATTACHED, None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that training changes: LoRA weights and the selector's own parameters."""
        return lora_parameters(self.base_model) | {
            f"selector.{name}": p for name, p in self.selector.named_parameters()
        }

    def save(self, folder: str | Path, train_problems: tuple[str, ...] = (), card: str | None = None) -> None:
        """Write the folder; `s2t_config.json` goes last, so a half-written folder is never taken for an adapter."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.peft_model.save_pretrained(str(folder), safe_serialization=True)
        state = {name: value.detach().contiguous().cpu() for name, value in self.selector.state_dict().items()}
        write_bytes(folder / SELECTOR_FILE, save(state))
        write_text(folder / PROBLEMS_FILE, "".join(f"{item}\n" for item in sorted(train_problems)))
        write_text(folder / "README.md", card or _card(self.config))
        write_json(folder / CONFIG_FILE, asdict(self.config))


class Selector(nn.Module):
    """The adapter's parameters outside the LoRA: R bin rows, and two criticality rows or a small MLP; all float32."""

    def __init__(self, config: AdapterConfig, width: int) -> None:
        super().__init__()
        self.bins = nn.Parameter(torch.randn(config.num_bins, width) * 0.02)  # [R, H]
        if config.criticality == "head":
            self.head = nn.Sequential(nn.Linear(width, config.head_size), nn.GELU(), nn.Linear(config.head_size, 1))
        else:
            self.yes_no = nn.Parameter(torch.zeros(2, width))  # [2, H]

    def bin_logits(self, hidden: Tensor) -> Tensor:
        """Logits of the R reserved ids; [..., H] -> [..., R], float32."""
        return hidden.float() @ self.bins.T

    def criticality_logits(self, hidden: Tensor) -> Tensor:
        """z_yes - z_no, or the head's logit; [..., H] -> [...], float32."""
        if hasattr(self, "head"):
            return self.head(hidden.float()).squeeze(-1)
        return hidden.float() @ (self.yes_no[0] - self.yes_no[1])


class MergedSelector(SelectorReader):
    """The readings of a merged model of scope `always`: the LoRA is in its weights, the bins in its output rows."""

    def __init__(self, loaded: LoadedModel) -> None:
        merged = loaded.merged
        assert merged is not None and merged.scope == "always"
        super().__init__(loaded, adapter_config(merged.adapter), loaded.model, merged.reserved)
        state = {"bins": self._rows(merged.reserved.bins)}
        if self.config.criticality == "reserved":
            state["yes_no"] = self._rows(merged.reserved.criticality)
        else:
            state |= load_file(Path(merged.path) / SELECTOR_FILE)
        self.selector.load_state_dict(state)
        self.selector.eval().requires_grad_(False)

    def _rows(self, ids: tuple[int, ...]) -> Tensor:
        """Output rows of some ids, float32; [len(ids), H]."""
        head: Any = self.base_model.get_output_embeddings()
        return head.weight[list(ids)].detach().float()


def load_selector(adapter: str | Path | None, loaded: LoadedModel) -> SelectorReader | None:
    """What selects beside this model: an adapter folder, else what the model was merged with, else nothing.

    Raises ModelError, one line, when the folder is none, is damaged, or belongs to another base model.
    """
    if adapter is not None:
        return load_adapter(adapter, loaded)
    if loaded.merged is None:
        return None
    if loaded.merged.scope != "always":
        return load_adapter(Path(loaded.merged.path) / ADAPTER_FOLDER, loaded)
    try:
        return MergedSelector(loaded)
    except (OSError, RuntimeError, IndexError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"merged model {loaded.name} is damaged: {reason}; merge it again.") from error


def selector_config(adapter: str | Path | None, slm: str) -> AdapterConfig | None:
    """The settings of what `load_selector` would give, without loading a model."""
    if adapter is not None:
        return read_adapter_config(adapter)
    folder = local_folder(slm)
    return adapter_config(read_merged(folder).adapter) if is_merged(folder) else None


def selector_problems(adapter: str | Path | None, slm: str) -> frozenset[str]:
    """Hashes of the problems that this SLM (distilled, or merged), or what `load_selector` would give, was trained on."""
    return problem_hashes(local_folder(slm)) | (problem_hashes(adapter) if adapter is not None else frozenset())


def attached_adapter(model: nn.Module) -> SelectorAdapter | None:
    """The adapter attached to this base model, if any."""
    return model.__dict__.get(_ATTACHED)


def _what_it_is(folder: Path) -> str:
    """Why a path is no adapter folder, in words."""
    if not folder.exists():
        return f"adapter {folder} does not exist"
    if (folder / "adapter" / CONFIG_FILE).is_file():
        return f"{folder} is a run, its adapter is {folder / 'adapter'}"
    return f"{folder} is no adapter folder: {CONFIG_FILE} is missing"


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """The metadata of an adapter folder; raises ModelError where the folder is none."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ModelError(f"{_what_it_is(Path(folder))}; pass the folder `s2t train` wrote.")
    if is_merged(folder):
        raise ModelError(f"{folder} is a merged model, not an adapter; pass --slm {folder} without --adapter.")
    data = read_json(path)
    if not isinstance(data, dict) or not {"base_model", "base_fingerprint"} <= data.keys():
        raise ModelError(f"adapter {folder} is damaged: {CONFIG_FILE} names no base_model; train it again.")
    known = {item.name for item in fields(AdapterConfig)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ModelError(f"{path} has unknown keys {', '.join(unknown)}; it was written by a newer s2t; upgrade.")
    return adapter_config(data)


def adapter_config(data: dict[str, Any]) -> AdapterConfig:
    """The metadata from what was written."""
    values: dict[str, Any] = {**data, "heldout_templates": tuple(data.get("heldout_templates", ()))}
    return AdapterConfig(**values)


def load_adapter(folder: str | Path, loaded: LoadedModel) -> SelectorAdapter:
    """Attach a saved adapter to its base model.

    Raises ModelError, one line, when the folder is none, is damaged, or belongs to another base model.
    """
    config = read_adapter_config(folder)
    if config.base_fingerprint != loaded.fingerprint:
        is_same = config.base_model == loaded.name
        hint = "load the revision and quantization it was trained on" if is_same else f"pass --slm {config.base_model}"
        raise ModelError(
            f"adapter {folder} was trained on {config.base_model} (weights {config.base_fingerprint}), not on "
            f"{loaded.name} (weights {loaded.fingerprint}); {hint}."
        )
    if not (Path(folder) / LORA_FILE).is_file():  # PEFT would go on to a pickled file
        raise ModelError(
            f"adapter {folder} is damaged: {LORA_FILE} is missing; weights are read from safetensors only."
        )
    peft, peft_model = import_peft(), None
    try:
        state = load_file(Path(folder) / SELECTOR_FILE)
        with safe_open(
            Path(folder) / LORA_FILE, framework="pt"
        ):  # its header and length, before PEFT touches the model
            pass
        with quiet_peft():
            peft_model = peft.PeftModel.from_pretrained(loaded.model, str(folder))
        adapter = SelectorAdapter(loaded, config, peft_model)
        adapter.selector.load_state_dict(state)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if peft_model is not None:
            peft_model.unload()  # the base model stays usable
        raise ModelError(f"adapter {folder} is damaged: {' '.join(str(error).split())[:200]}.") from error
    adapter.selector.eval().requires_grad_(False)
    return adapter


def train_problem_hashes(folder: str | Path) -> frozenset[str]:
    """Hashes of the problems the adapter was trained on (empty for folders without the list)."""
    return problem_hashes(folder)


def _new_peft_model(loaded: LoadedModel, config: AdapterConfig) -> Any:
    return new_lora(loaded.model, config.lora_rank, config.lora_alpha, config.lora_dropout)


def _tuner_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _add_lora(first: int, num_tokens: int, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Add a plain LoRA layer's own term to the tokens from `first` on, as its forward would (no dropout: inference)."""
    if args[0].shape[-2] != num_tokens:
        raise ModelError("this model routes tokens to experts, so its LoRA cannot act on some alone; use scope always.")
    states = args[0].flatten(0, -2)[first:]  # [n, H]
    tail = output.view(num_tokens, -1)[first:]
    for name in layer.active_adapters:
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        inner = F.linear(states.to(down.dtype), down)
        if up.dtype == tail.dtype:
            tail.addmm_(inner, up.T, alpha=layer.scaling[name])
        else:
            tail.add_((F.linear(inner, up) * layer.scaling[name]).to(tail.dtype))


def _card(config: AdapterConfig) -> str:
    rows = "\n".join(f"| {key} | {json.dumps(value)} |" for key, value in asdict(config).items() if value)
    front = f"---\nlibrary_name: peft\nbase_model: {config.base_model}\n---\n\n"
    return f"{front}# S2T-LOCAL adapter\n\n| setting | value |\n| --- | --- |\n{rows}\n"
