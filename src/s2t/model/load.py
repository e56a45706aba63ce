"""Model and tokenizer from a hub id, a folder, an adapter on a base, or the embedded pair; checks that two can pair.

Weights load from safetensors only and remote code stays off unless asked for. Every failure is one line.
"""

from __future__ import annotations

import ctypes
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from s2t.errors import ConfigError, ModelError, S2TError
from s2t.hub import offline_unless_it_answers
from s2t.model.chat import stop_ids
from s2t.model.checkpoint import check_complete, check_config, check_generation_config, check_runs
from s2t.model.gguf.file import Header, find_gguf, names_gguf
from s2t.model.gguf.tokenizer import load_tokenizer
from s2t.model.loaded import LoadedModel, fingerprint
from s2t.model.lora import Lora, find_lora, lora_base, merge_lora
from s2t.model.merged import MergedConfig, check_revision, local_folder, open_merged
from s2t.model.quantization import quantization_config
from s2t.model.quiet import quiet
from s2t.model.slots import check_cacheable
from s2t.model.tiny import embedded_path, is_embedded
from s2t.model.why import why_not_loaded
from s2t.progress import progress

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    execution: str = "auto",
    revision: str | None = None,
    quantization: str | None = None,
    device_map: str | None = None,
) -> LoadedModel:
    """Load `name` for inference, in eval mode, with SDPA attention where the model has it.

    `name` is a hub id, a folder, an embedded model, a GGUF file (a path, or hub:OWNER/NAME/FILE.gguf; its weights are unpacked),
    or a PEFT adapter (folder or hub id), which is merged into the base it names. `execution` is how the engines of this model
    run their steps: auto, eager, static or compile.
    `quantization` is a name, a JSON object or a JSON file; `device_map` is transformers' own and takes the place of
    `device`; the whole model has to end up on one device.

    Raises ModelError or ConfigError, one line, when the model is missing, gated, has no safetensors weights, needs
    remote code or a package that is not installed, does not fit one device, has a cache that cannot be branched, or is a
    merged folder that is damaged.
    """
    if device_map is not None and device != "auto":
        raise ConfigError(f"device {device} and device_map {device_map} were both given; pass one of them.")
    check_revision(name, revision)
    check_is_no_file(name)
    place = torch.device(pick_device(device)) if device_map is None else None
    with one_line(name, revision, quantization), progress(f"load {name}", 0, unit="tensors", brief=True) as bar:
        source = name if is_embedded(name) else local_folder(name, revision)
        merged = None if is_embedded(name) else open_merged(source)
        header = find_gguf(source, revision)
        reading = _Reading(name, dtype, place, device_map, quantization, {"trust_remote_code": trust_remote_code})
        with quiet(bar), nullcontext() if _is_here(name) else offline_unless_it_answers():
            lora = None if is_embedded(name) or merged or header else find_lora(name, revision)
            if header is not None:
                tokenizer, model = reading.unpacked(header)
            else:
                tokenizer, model = reading.merged(lora, revision) if lora else reading.plain(source, revision)
        identity = fingerprint(model)  # before any cast that cannot hold every value of the checkpoint
        reading.cast(model)
        loaded = replace(wrap_model(name, model, tokenizer, merged), execution=execution)
        check_runs(name, model)
    if merged is None or merged.scope == "always":
        loaded.__dict__["fingerprint"] = identity
    return loaded


@contextmanager
def one_line(name: str, revision: str | None = None, quantization: str | None = None) -> Iterator[None]:
    """The boundary to files of others: whatever a parser, a download or a model's own code raises in it becomes a ModelError."""
    try:
        yield
    except S2TError:
        raise
    except Exception as error:
        raise ModelError(why_not_loaded(name, error, revision, quantization)) from error


def check_is_no_file(name: str) -> None:
    """Raise ModelError for a model that is given as one file, unless that is a GGUF file."""
    if os.path.isfile(name) and not names_gguf(name):
        raise ModelError(f"{name} is a file; pass the folder it is in, with config.json, weights and tokenizer.")


def load_without_weights(name: str, revision: str | None = None, trust_remote_code: bool = False) -> LoadedModel:
    """What there is to know of a model whose weights are somewhere else, behind a server, say; its parameters are `meta`.

    Raises ModelError, one line, for what `load_model` would not find, and for a PEFT adapter, which no server merges.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    check_is_no_file(name)
    with one_line(name, revision), quiet():
        source = str(embedded_path(name)) if is_embedded(name) else local_folder(name, revision)
        merged = None if is_embedded(name) else open_merged(source)
        if (header := find_gguf(source, revision)) is not None:
            options = {"gguf_file": header.path.name}
            source = str(header.path.parent)
        if header is None and not is_embedded(name) and merged is None and find_lora(name, revision):
            raise ModelError(f"{name} is an adapter; serve a model, and name that.")
        tokenizer = load_tokenizer(header) if header else AutoTokenizer.from_pretrained(source, **options)
        config = AutoConfig.from_pretrained(source, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        with suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(source, revision=revision or "main")
        return wrap_model(name, model, tokenizer, merged)


@dataclass
class _Reading:
    """How the weights of one model are read: in which dtype, to which place."""

    name: str
    dtype: str
    place: torch.device | None
    device_map: str | None
    quantization: str | None
    options: dict[str, Any]
    final: torch.dtype | None = None  # to cast to once the weights are known; None leaves them

    def plain(self, name: str, revision: str | None) -> tuple[PreTrainedTokenizerBase, Any]:
        """Tokenizer and model of a checkpoint; float16, which cannot hold every bfloat16 value, is cast to later."""
        source = str(embedded_path(name)) if is_embedded(name) else name
        kind: Any = _DTYPES.get(self.dtype, "auto")
        if self.dtype == "float16" and self.quantization is None:
            kind, self.final = "auto", torch.float16
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **self.options)
        return tokenizer, self._weights(source, kind, revision, self.name)

    def unpacked(self, header: Header) -> tuple[PreTrainedTokenizerBase, Any]:
        """Tokenizer and model of a GGUF file."""
        from s2t.model.gguf.dense import load_dense

        if self.quantization is not None:
            raise ConfigError(f"{self.name} is quantized already; leave out --quantization {self.quantization}.")
        tokenizer, model = load_dense(header, _DTYPES.get(self.dtype), self.place, self.device_map)
        check_on_one_device(self.name, model)
        return tokenizer, model

    def merged(self, lora: Lora, revision: str | None) -> tuple[PreTrainedTokenizerBase, Any]:
        """Tokenizer and model of a base with an adapter merged into it, in float32 so that it is the same for every dtype."""
        if self.quantization is not None:
            raise ConfigError(
                f"adapter {lora.name} cannot be merged into quantized weights; merge it, save the model, then quantize."
            )
        source = str(embedded_path(lora.base)) if is_embedded(lora.base) else lora.base
        try:
            with one_line(lora.base, lora.base_revision):
                config = AutoConfig.from_pretrained(source, revision=lora.base_revision, **self.options)
                model = self._weights(source, torch.float32, lora.base_revision, lora.base)
                origin, version = (lora.name, revision) if lora.has_tokenizer else (source, lora.base_revision)
                tokenizer = AutoTokenizer.from_pretrained(origin, revision=version, **self.options)
        except ModelError as error:
            raise ModelError(f"adapter {lora.name} needs its base model: {error}") from error
        if lora.has_tokenizer and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # it added tokens
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        self.final = _DTYPES.get(self.dtype) or getattr(config, "dtype", None) or torch.float32
        return tokenizer, merge_lora(model, lora)

    def _weights(self, source: str, kind: Any, revision: str | None, name: str) -> Any:
        quantization = quantization_config(self.quantization)
        options = {**self.options, "revision": revision, "use_safetensors": True, "dtype": kind}
        if quantization is not None:
            options["quantization_config"] = quantization
        if self.device_map is not None:
            options["device_map"] = self.device_map
        elif quantization is not None:
            options["device_map"] = {"": self.place}
        read: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, found = read
        check_complete(name, model, found, source, revision)
        check_generation_config(source, revision)
        check_on_one_device(self.name, model)
        is_quantized = getattr(model, "hf_quantizer", None) is not None
        if self.place is not None and not (is_quantized and model.device.type == self.place.type):
            model.to(self.place)
        return model

    def cast(self, model: nn.Module) -> None:
        """Bring the parameters to their final dtype, where it is not the one they were read in."""
        if self.final is not None:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(self.final)


def check_on_one_device(name: str, model: nn.Module) -> None:
    """Raise ModelError where a device map spread a model, or left parts of it on the CPU or the disk."""
    mapped = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    places = sorted({str(parameter.device) for parameter in model.parameters()} | (mapped & {"disk"}))
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(
            f"the device map spread {name} over {', '.join(places)}, and steps run on one device; pass --device cuda:0, "
            "--device-map sequential, or --quantization bitsandbytes-4bit if it is too large for one."
        )


def wrap_model(
    name: str, model: Any, tokenizer: PreTrainedTokenizerBase, merged: MergedConfig | None = None
) -> LoadedModel:
    """A model already in memory (of a merged folder, perhaps) as a LoadedModel; checks that its cache can be branched."""
    check_config(name, model.config)
    check_cacheable(model.config)
    if getattr(model, "_is_stateful", False):
        raise ModelError(
            f"{model.config.model_type} carries a state instead of a cache that can be branched or cropped; "
            "use a model with plain attention layers."
        )
    if any(name.endswith(".sinks") for name, _ in model.named_parameters()):
        raise ModelError(
            f"{model.config.model_type} has attention sinks, which the tree step cannot read; use a plain-attention model."
        )
    takes_positions = "position_ids" in inspect.signature(model.get_decoder().forward).parameters
    if not takes_positions or getattr(model.config, "alibi", False):
        raise ModelError(
            f"{model.config.model_type} takes no position ids (its attention is biased by distance), so "
            "candidates cannot share a position; use a model with rotary or learned positions."
        )
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{model.config.model_type} computes attention in its own way, which cannot read cache slots; use a model "
            "whose code goes through transformers' attention interface."
        )
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    vocab_size = min(max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0])
    if merged is not None:
        vocab_size = min(vocab_size, merged.vocab_size)
    if model.device.type == "cpu":
        _keep_freed_memory()
    if model.device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length, which takes longer than the step
    return LoadedModel(name, model.eval(), tokenizer, vocab_size, stop_ids(tokenizer, eos), merged=merged)


def _keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB that was freed: what goes back to the system is cleared anew, page by page, at its next use.

    For the whole process; elsewhere than on glibc nothing happens. Source: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such library, no such function, or none that can be opened
        allocator = ctypes.CDLL(None)
        for option, num_bytes in ((-3, 32 << 20), (-1, 1 << 30)):
            allocator.mallopt(option, num_bytes)


def give_back_freed_memory() -> None:
    """Let glibc give what was freed back to the system now; elsewhere nothing happens. Source: malloc_trim(3)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def pick_device(device: str) -> str:
    """Resolve `auto`; raises ModelError for a device this torch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError(f"device {device} was asked for but this torch sees no GPU; use --device cpu.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ModelError(f"device {device} is none that this torch can use; try auto, cpu or cuda.") from error
    return device


def _is_here(name: str) -> bool:
    """Whether the model is on this machine, and its base too, so that nobody asks the hub."""
    source = lora_base(name) or name
    return is_embedded(source) or os.path.exists(source)
