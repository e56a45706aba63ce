"""One llama.cpp context: cells of a unified cache that sequences share, and forwards over them. Knows no rows and no methods."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from s2t.errors import ModelError
from s2t.model.gguf.library import last_error, llama
from s2t.model.gguf.weights import CACHE_TYPES, GgufModel

TOKENS_AT_ONCE = 512
OUTPUTS_AT_ONCE = 64  # their logits are kept at once: 0.6 MB each for a vocabulary of 150,000
_ROUND = 256  # llama.cpp's own unit of cells


class Context:
    """`decode` reads tokens into sequences; `copy`, `crop` and `drop` change which cells a sequence holds."""

    def __init__(self, loaded: GgufModel, num_cells: int, num_sequences: int, lora: Any = None) -> None:
        self.loaded, self.weights, self.lora = loaded, loaded.weights, lora
        self.num_sequences = num_sequences
        self.num_cells = -(-num_cells // _ROUND) * _ROUND
        self._api = llama()
        self._pointer, self._memory = self._open()
        self._is_adapted = self._gives_states = False
        self._batch = _Batch()

    def _open(self) -> tuple[Any, Any]:
        api, loaded = self._api, self.loaded
        params = api.llama_context_default_params()
        params.n_ctx, params.n_seq_max = self.num_cells, self.num_sequences
        params.n_batch = params.n_ubatch = TOKENS_AT_ONCE
        params.n_outputs_max = OUTPUTS_AT_ONCE
        params.n_threads = params.n_threads_batch = loaded.threads
        params.type_k = params.type_v = CACHE_TYPES[loaded.cache_dtype]
        params.kv_unified = params.swa_full = params.no_perf = True
        params.embeddings = False
        if loaded.cache_dtype == "float32":  # flash attention computes in half precision
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        pointer = api.llama_init_from_model(self.weights.pointer, params)
        if not pointer:
            raise ModelError(
                f"llama.cpp cannot make room for {self.num_cells} tokens of {loaded.name}: "
                f"{last_error() or 'it gives no reason'}; pass a smaller --batch-size or --context."
            )
        self._closing = weakref.finalize(self, _free, api, pointer, self.weights)  # the weights stay as long
        return pointer, api.llama_get_memory(pointer)

    @property
    def cache_bytes(self) -> int:
        return self.loaded.cache_bytes(self.num_cells)

    def adapt(self, on: bool) -> None:
        """Switch the LoRA on or off for the tokens that follow."""
        if on == self._is_adapted:
            return
        api = self._api
        pointers, scales = (api.llama_adapter_lora_p_ctypes * 1)(self.lora), (ctypes.c_float * 1)(1.0)
        if api.llama_set_adapters_lora(self._pointer, pointers if on else None, int(on), scales if on else None):
            raise ModelError(f"llama.cpp cannot apply the adapter: {last_error() or 'it gives no reason'}.")
        self._is_adapted = on

    def decode(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> None:
        """Read tokens into their sequences, without logits."""
        self._run(tokens, positions, sequences, False)

    def read(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> np.ndarray:
        """Read tokens into their sequences; the final state of each and its logits behind, float32 [n, H + V]."""
        width, rows = self.weights.width, self.weights.num_rows
        states = np.empty((len(tokens), width + rows), dtype=np.float32)
        for at in range(0, len(tokens), OUTPUTS_AT_ONCE):
            part = slice(at, at + OUTPUTS_AT_ONCE)
            self._run(tokens[part], positions[part], sequences[part], True)
            count = len(tokens[part])
            states[part, :width] = self._floats(self._api.llama_get_embeddings, count * width).reshape(count, width)
            states[part, width:] = self._floats(self._api.llama_get_logits, count * rows).reshape(count, rows)
        return states

    def _floats(self, get: Any, count: int) -> np.ndarray:
        address = ctypes.cast(get(self._pointer), ctypes.c_void_p).value
        assert address is not None, "a forward with outputs has them"
        buffer: Any = (ctypes.c_float * count).from_address(address)
        return np.frombuffer(buffer, dtype=np.float32)

    def _run(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: bool) -> None:
        if wanted != self._gives_states:  # with states llama.cpp gives the logits of all tokens
            self._api.llama_set_embeddings(self._pointer, wanted)
            self._gives_states = wanted
        for at in range(0, len(tokens), TOKENS_AT_ONCE):
            part = slice(at, at + TOKENS_AT_ONCE)
            batch = self._batch.filled(self._api, tokens[part], positions[part], sequences[part], wanted)
            if code := self._api.llama_decode(self._pointer, batch):
                raise ModelError(f"llama.cpp stopped with code {code}: {last_error() or 'it gives no reason'}.")

    # Cells

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a sequence hold the first cells of another, and no others; nothing is moved."""
        self._api.llama_memory_seq_rm(self._memory, target, -1, -1)
        if length:
            self._api.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def crop(self, sequence: int, length: int) -> None:
        """Forget the tokens of a sequence past a length."""
        self._api.llama_memory_seq_rm(self._memory, sequence, length, -1)

    def grow(self, num_cells: int, sequences: Sequence[int]) -> None:
        """Move to a cache of more cells, with what these sequences hold."""
        api, old = self._api, self._pointer
        kept = {}
        for sequence in sequences:
            size = api.llama_state_seq_get_size(old, sequence)
            buffer = (ctypes.c_uint8 * size)()
            api.llama_state_seq_get_data(old, buffer, size, sequence)
            kept[sequence] = buffer
        self._closing()
        self.num_cells = -(-num_cells // _ROUND) * _ROUND
        self._pointer, self._memory = self._open()
        self._is_adapted = self._gives_states = False
        for sequence, buffer in kept.items():
            if not api.llama_state_seq_set_data(self._pointer, buffer, len(buffer), sequence):
                raise ModelError(f"llama.cpp lost a sequence: {last_error() or 'it gives no reason'}.")


class _Batch:
    """The arrays of one forward's tokens, made once; each token belongs to one sequence."""

    def __init__(self) -> None:
        self.tokens, self.positions, self.counts, self.sequences = np.zeros((4, TOKENS_AT_ONCE), dtype=np.int32)
        self.counts[:] = 1
        self.outputs = np.zeros(TOKENS_AT_ONCE, dtype=np.int8)
        self.batch: Any = None

    def filled(
        self, api: Any, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: bool
    ) -> Any:
        count = len(tokens)
        self.tokens[:count], self.positions[:count], self.sequences[:count] = tokens, positions, sequences
        self.outputs[:count] = wanted
        if self.batch is None:
            self.batch = self._made(api)
        self.batch.n_tokens = count
        return self.batch

    def _made(self, api: Any) -> Any:
        integers = ctypes.POINTER(ctypes.c_int32)
        first = self.sequences.ctypes.data
        self._each = (integers * TOKENS_AT_ONCE)(*(ctypes.cast(first + 4 * i, integers) for i in range(TOKENS_AT_ONCE)))
        return api.llama_batch(
            n_tokens=0,
            token=self.tokens.ctypes.data_as(integers),
            embd=None,
            pos=self.positions.ctypes.data_as(integers),
            n_seq_id=self.counts.ctypes.data_as(integers),
            seq_id=ctypes.cast(self._each, ctypes.POINTER(integers)),
            logits=self.outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )


def _free(api: Any, pointer: Any, weights: Any) -> None:
    api.llama_free(pointer)
