"""A GGUF model as the llama.cpp engine has it: its weights in llama.cpp, and what the loop asks of a loaded model."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from s2t.errors import ModelError
from s2t.model.chat import stop_ids
from s2t.model.gguf.file import Header
from s2t.model.gguf.library import default_threads, last_error, llama
from s2t.model.gguf.tokenizer import WHOLE, load_tokenizer, stop_ids_of
from s2t.model.load import give_back_freed_memory
from s2t.model.loaded import FlopCount, LoadedModel
from s2t.model.merged import MergedConfig
from s2t.model.reserved import ReservedIds, choose_reserved_ids
from s2t.progress import note

if TYPE_CHECKING:
    from s2t.model.gguf.engine import GgufEngine

CACHE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 30}  # ggml's numbers
CACHE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_SAMPLE = "Natalia sold 48 clips; she'll sell 3.5x more.\n\n\tif x == 10:  # naïve 日本語 😀\r\n    return [x * 2]"


class Weights:
    """llama.cpp's model, freed with this object; `pointer` is for its functions."""

    def __init__(self, header: Header) -> None:
        api = llama()
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = b"AMX_INT8 = 1" not in api.llama_print_system_info()
        # compiled by gcc, the code for AMX ends the process with a fault (ggml-org/llama.cpp, issue 20824)
        self.pointer = api.llama_model_load_from_file(str(header.path).encode(), params)
        if not self.pointer:
            raise ModelError(f"llama.cpp cannot load {header.path}: {last_error() or 'it gives no reason'}.")
        weakref.finalize(self, api.llama_model_free, self.pointer)
        self.num_params = int(api.llama_model_n_params(self.pointer))
        self.num_bytes = int(api.llama_model_size(self.pointer))
        self.width = int(api.llama_model_n_embd(self.pointer))
        self.vocab = api.llama_model_get_vocab(self.pointer)
        self.num_rows = int(api.llama_vocab_n_tokens(self.vocab))
        self._check(header)

    def _check(self, header: Header) -> None:
        api = llama()
        if api.llama_model_is_recurrent(self.pointer) or api.llama_model_is_hybrid(self.pointer):
            raise ModelError(
                f"{header.architecture} carries a state instead of a cache that can be cropped; use a model with plain "
                "attention layers."
            )
        if api.llama_model_has_encoder(self.pointer):
            raise ModelError(f"{header.architecture} has an encoder; use a decoder-only model.")

    def tokenize(self, text: str) -> list[int]:
        """Ids by llama.cpp's own tokenizer; no special tokens are added, and none are read from the text."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (llama().llama_token * room)()
        count = llama().llama_tokenize(self.vocab, raw, len(raw), ids, room, False, False)
        return list(ids[: max(0, count)])


@dataclass(frozen=True)
class GgufModel(LoadedModel):
    """A model that llama.cpp runs; `model` is its `Weights`."""

    header: Any = None
    cache_dtype: str = "float16"
    threads: int = 1
    max_context: int | None = None
    most_rows: ClassVar[int] = 64  # well under llama.cpp's own limit
    states_hold_logits: ClassVar[bool] = True

    def open_engine(self, max_rows: int, adapter: Any = None) -> GgufEngine:
        from s2t.model.gguf.engine import GgufEngine

        return GgufEngine(self, max_rows, adapter)

    @cached_property
    def head(self) -> Any:
        return _Head(self.weights.width)

    @cached_property
    def flops(self) -> FlopCount:
        return GgufFlops(self.header)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def weights(self) -> Weights:
        found: Any = self.model
        return found

    @cached_property
    def num_params(self) -> int:
        return self.weights.num_params

    @cached_property
    def fingerprint(self) -> str:
        """Of the base model where an adapter was exported with it; else of the file's header and first tensors."""
        if self.merged is not None:
            return str(self.merged.adapter["base_fingerprint"])
        with open(self.header.path, "rb") as file:
            return hashlib.blake2b(file.read(2**24), digest_size=8).hexdigest()

    def reserved_for(self, num_bins: int) -> ReservedIds:
        return choose_reserved_ids(self.tokenizer.get_vocab(), self.weights.num_rows, num_bins)

    @property
    def context_length(self) -> int | None:
        limits = [limit for limit in (self.header.context_length, self.max_context) if limit]
        return min(limits, default=None)

    def cache_bytes(self, num_tokens: int) -> int:
        """Memory that keys and values of so many tokens take."""
        return num_tokens * self.header.cached_values * CACHE_BYTES[self.cache_dtype]

    def facts_at(self, length: int | None) -> dict[str, Any]:
        """What runs it: engine, quantization, threads, and the memory of weights and of one sequence of that length."""
        return {
            "engine": "llama.cpp",
            "quantization": self.header.quantization,
            "threads": self.threads,
            "context_length": length,
            "weights_bytes": self.weights.num_bytes,
            "cache_bytes": self.cache_bytes(length or 0),
        }


def load_gguf(
    name: str,
    header: Header,
    merged: MergedConfig | None = None,
    dtype: str = "auto",
    threads: int = 0,
    context: int = 0,
) -> GgufModel:
    """Load a GGUF file into llama.cpp. `dtype` is that of its cache (auto: float16), `threads` 0 takes the physical cores,
    `context` 0 what the model was trained to read.

    Raises ModelError, one line, where llama.cpp is missing, cannot read the file, or the model has no cache to crop.
    """
    tokenizer, own_ids, is_given = load_tokenizer(header), stop_ids_of(header), WHOLE in header.fields
    header, highest_id = header.without_tokenizer(), max(tokenizer.get_vocab().values())
    give_back_freed_memory()  # before the weights come: a vocabulary takes 100 MiB while it is built
    weights: Any = Weights(header)
    _check_tokens(name, weights, tokenizer, is_given)
    vocab_size = min(highest_id + 1, weights.num_rows)
    if merged is not None:
        vocab_size = min(vocab_size, merged.vocab_size)
    return GgufModel(
        name,
        weights,
        tokenizer,
        vocab_size,
        stop_ids(tokenizer, own_ids),
        merged=merged,
        header=header,
        cache_dtype="float16" if dtype == "auto" else dtype,
        threads=threads or default_threads(),
        max_context=context or None,
    )


def _check_tokens(name: str, weights: Weights, tokenizer: Any, is_given: bool) -> None:
    """Compare ids of a text with those of llama.cpp's own tokenizer; where the file gives the tokenizer itself, that is right."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    text = _SAMPLE if normalizer is None else normalizer.normalize_str(_SAMPLE)
    own, theirs = tokenizer.encode(text, add_special_tokens=False), weights.tokenize(text)
    if own == theirs:
        return
    at = next((i for i, pair in enumerate(zip(own, theirs, strict=False)) if pair[0] != pair[1]), len(own))
    what = (
        f"the tokenizer in {name} and llama.cpp's own differ at token {at} of a sample text ({own[at : at + 3]} and "
        f"{theirs[at : at + 3]})"
    )
    if not is_given:
        raise ModelError(f"{what}; convert the model again with a current llama.cpp, or use its folder.")
    note(f"{what}; s2t goes by the file's own tokenizer, other programs may not")


class _Head:
    """Logits out of states: they stand in them already."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, states: Tensor) -> Tensor:
        """[..., H + V] -> [..., V], float32, fresh."""
        return states[..., self.width :].clone()

    own = __call__


class GgufFlops(FlopCount):
    """As the torch engine counts, from the shapes in a file's header."""

    def __init__(self, header: Header) -> None:
        embedding = header.shapes.get("token_embd.weight", (0, 0))
        is_tied = "output.weight" not in header.shapes
        size = embedding[0] * embedding[1]
        self.per_token = 2.0 * (header.num_params - (0 if is_tied else size))
        self.per_attended = 4.0 * header.of_model("block_count", 0) * header.of_model("embedding_length", 0)
