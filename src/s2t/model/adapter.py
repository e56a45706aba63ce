"""The selector adapter: LoRA weights, its reading of candidates, a criticality reading, and the metadata that explains them.

On disk it is a PEFT adapter folder plus `s2t_selector.safetensors` and `s2t_config.json`; loading refuses
a base model whose weights are not those it was trained on. A merged folder (`s2t merge`) has the same readings in the
model itself. Knows nothing of decoding or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from s2t.core.rule import criticality, expected_bin, score
from s2t.errors import MissingExtraError, ModelError
from s2t.files import write_bytes, write_json, write_text
from s2t.model.adapter_config import AdapterConfig, adapter_config, check_weights, read_adapter_config
from s2t.model.card import EVAL_FILE, adapter_card
from s2t.model.loaded import LoadedModel
from s2t.model.lora import import_peft, lora_parameters, new_lora, quiet_peft, tuner_layers
from s2t.model.merged import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    PROBLEMS_FILE,
    SELECTOR_FILE,
    adapter_folder,
    is_merged,
    local_folder,
    problem_hashes,
    read_merged,
    sha256,
)
from s2t.model.plain_lora import attach_plain
from s2t.model.reserved import ReservedIds

LORA_FILE = "adapter_model.safetensors"  # PEFT's name
_WEIGHTS = (LORA_FILE, SELECTOR_FILE)
ATTACHED = "_s2t_adapter"
"""Where the `__dict__` of a base model, and not of what wraps it, holds the adapter that is attached to it."""
BRANCH_SCOPES = ("step", "candidates")
"""Scopes under which the LoRA acts inside the base model's own forward, on the tokens beside it that are read for the choice."""


class SelectorReader:
    """What the loop reads from hidden states: scores of candidates, and criticality; of an adapter or a merged model."""

    def __init__(self, loaded: LoadedModel, config: AdapterConfig, base_model: Any, reserved: ReservedIds) -> None:
        self.config, self.loaded, self.base_model, self.reserved = config, loaded, base_model, reserved
        self.head = loaded.head
        self.selector = SelectorHeads(config, int(self.head.linear.weight.shape[1])).to(loaded.device)

    @property
    def scope(self) -> str:
        return self.config.scope

    def act(self, on: bool) -> None:
        """Switch the LoRA weights on or off for the forwards that follow; merged ones are always on."""

    def acting_from(self, first: int, num_tokens: int) -> AbstractContextManager[None]:
        """Let the LoRA act on the tokens from place `first` of a flat forward of N on, and on no others."""
        raise NotImplementedError

    @property
    def ranks(self) -> bool:
        """Whether the last token of the prefix is read once more (readout `rank`), and no candidate."""
        return self.config.readout == "rank"

    def expected(self, hidden: Tensor) -> Tensor:
        """Expected bin of candidates from their hidden states; [..., H] -> [...], in [0, 1]."""
        return expected_bin(self.selector.bin_logits(hidden))

    def scores(self, hidden: Tensor, ids: Tensor, slm_logprobs: Tensor) -> Tensor:
        """Selection scores of K candidates, [n, K], float32; `ids` and `slm_logprobs` are [n, K].

        `hidden` are the candidates' states [n, K, H], or under readout `rank` that of the prefix's last token, [n, 1, H].
        """
        return self.combined(self.readings(hidden, ids), slm_logprobs, self.config.adapter_weight)

    def readings(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """What the adapter alone says of K candidates, from states as in `scores`: log p_A over them, or e / temperature."""
        if self.ranks:
            return self.head.at(hidden[:, 0], ids).log_softmax(-1)
        return self.expected(hidden) / self.config.score_temperature

    def combined(self, readings: Tensor, slm_logprobs: Tensor, adapter_weight: float) -> Tensor:
        """Scores from readings at a weight of the adapter; see `core.rule.score`."""
        prior = 1 - adapter_weight if self.ranks else self.config.prior_weight
        return score(readings, slm_logprobs, adapter_weight, prior)

    def criticality(self, hidden: Tensor) -> Tensor:
        """Estimate in [0, 1] that the next token is a divergence point, from the state it is read from; [..., H] -> [...]."""
        return criticality(self.selector.criticality_logits(hidden))


class SelectorAdapter(SelectorReader):
    """An adapter attached to a base model; `act` switches its LoRA on and off, scores and criticality read hidden states."""

    def __init__(self, loaded: LoadedModel, config: AdapterConfig, peft_model: Any = None) -> None:
        self.peft_model = peft_model if peft_model is not None else _new_peft_model(loaded, config)
        super().__init__(loaded, config, self.peft_model.get_base_model(), reserved_of(config, loaded))
        self.layers = tuner_layers(self.base_model)
        self._acting: bool | None = None
        self.base_model.__dict__[ATTACHED] = self
        self.act(False)

    def act(self, on: bool) -> None:
        """Switch the LoRA weights on or off for the forwards that follow."""
        if on == self._acting:
            return
        for layer in self.layers:  # not by PEFT's own switch, which also changes what is trained
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
        hooks = [layer.register_forward_hook(partial(_add_lora, first, num_tokens)) for layer in self.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def detach(self) -> None:
        """Give the base model its own layers back; the adapter is of no further use."""
        self.act(True)  # PEFT hands back what it wrapped
        self.peft_model.unload()
        self.base_model.__dict__.pop(ATTACHED, None)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that training changes: LoRA weights and the selector's own parameters."""
        return lora_parameters(self.base_model) | {
            f"selector.{name}": p for name, p in self.selector.named_parameters()
        }

    def save(
        self,
        folder: str | Path,
        train_problems: tuple[str, ...] = (),
        training: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the folder; `s2t_config.json` goes last, so a half-written folder is never taken for an adapter.

        `training` has numbers for the model card. `weights` are those of `trainable`, where this process holds only a part of
        them. The hashes of what was written become part of `config`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / EVAL_FILE).unlink(missing_ok=True)  # of other weights
        weights = weights or self.trainable()
        lora = {f"base_model.model.{name}": value for name, value in weights.items() if "lora_" in name}
        self.peft_model.save_pretrained(str(folder), safe_serialization=True, state_dict=lora)
        state = {
            name.removeprefix("selector."): value.detach().contiguous().cpu()
            for name, value in weights.items()
            if name.startswith("selector.")
        }
        write_bytes(folder / SELECTOR_FILE, save(state))
        write_text(folder / PROBLEMS_FILE, "".join(f"{item}\n" for item in sorted(train_problems)))
        hashes = {name: sha256(folder / name) for name in _WEIGHTS}
        self.config = replace(self.config, weights=hashes, reserved_ids=self.reserved.all)
        write_text(folder / "README.md", adapter_card(asdict(self.config), training))
        write_json(folder / CONFIG_FILE, asdict(self.config))


class SelectorHeads(nn.Module):
    """The adapter's parameters outside the LoRA: R bin rows, if it reads any, and two criticality rows or a small MLP."""

    def __init__(self, config: AdapterConfig, width: int) -> None:
        super().__init__()
        if config.readout == "bins":
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


def selector_config(adapter: str | Path | None, slm: str, revision: str | None = None) -> AdapterConfig | None:
    """The settings of what `load_selector` would give, without loading a model."""
    if adapter is not None:
        return read_adapter_config(adapter)
    folder = local_folder(slm, revision)
    return adapter_config(read_merged(folder).adapter) if is_merged(folder) else None


def selector_problems(adapter: str | Path | None, slm: str, revision: str | None = None) -> frozenset[str]:
    """Hashes of the problems that this SLM (distilled, or merged), or what `load_selector` would give, was trained on."""
    own = problem_hashes(adapter_folder(adapter)) if adapter is not None else frozenset()
    return problem_hashes(local_folder(slm, revision)) | own


def load_adapter(folder: str | Path, loaded: LoadedModel, with_peft: bool = False) -> SelectorAdapter:
    """Attach a saved adapter, a folder or a hub id, to its base model; `with_peft` says that its LoRA must be PEFT's own.

    Raises ModelError, one line, when it is none, is not what was saved, or belongs to another base model.
    """
    folder = adapter_folder(folder)
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
    check_weights(folder, config.weights)
    peft_model: Any = None
    try:
        state = load_file(Path(folder) / SELECTOR_FILE)
        with safe_open(
            Path(folder) / LORA_FILE, framework="pt"
        ):  # its header and length, before PEFT touches the model
            pass
        peft_model = None if with_peft else attach_plain(loaded.model, Path(folder))
        if peft_model is None:
            with quiet_peft():
                peft_model = import_peft().PeftModel.from_pretrained(loaded.model, str(folder))
        adapter = SelectorAdapter(loaded, config, peft_model)
        adapter.selector.load_state_dict(state)
    except MissingExtraError:
        raise
    except Exception as error:  # whatever a damaged file makes PEFT, or us, raise
        if peft_model is not None:
            peft_model.unload()  # the base model stays usable
        raise ModelError(f"adapter {folder} is damaged: {' '.join(str(error).split())[:200]}.") from error
    adapter.selector.eval().requires_grad_(False)
    return adapter


def reserved_of(config: AdapterConfig, loaded: LoadedModel) -> ReservedIds:
    """The ids the adapter was saved with, else those that are free in this model."""
    ids, found = config.reserved_ids, loaded.reserved_for(config.num_bins)
    return replace(found, bins=ids[:-2], criticality=(ids[-2], ids[-1])) if len(ids) > 2 else found


def _new_peft_model(loaded: LoadedModel, config: AdapterConfig) -> Any:
    return new_lora(loaded.model, config.lora_rank, config.lora_alpha, config.lora_dropout)


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
