"""A GGUF file as a name and as a header: where it is, what it says of the model, and how its weights are packed.

Reads the header alone, in one pass; a vocabulary of 150,000 tokens takes a fraction of a second. Knows no weights.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from s2t.errors import ModelError
from s2t.hub import offline_unless_it_answers

MODEL_FILE = "model.gguf"  # of a folder that `s2t export` writes
LORA_FILE = "lora.gguf"
HUB_PREFIX = "hub:"
_HUB_FILE = re.compile(r"hub:([\w.-]+/[\w.-]+)/(.+\.gguf)")
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"},
}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: "float32", 1: "float16", 32: "bfloat16"}  # file types whose weights are not packed
_FILE_TYPES = {
    **_FLOATS,
    **{2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L"},
    **{14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S"},
    **{22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M"},
    **{30: "IQ4_XS", 31: "IQ1_M", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4"},
}


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself: its fields, and the shape of every tensor (rows first, as torch has it)."""

    path: Path
    fields: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        return str(self.fields.get("general.architecture", ""))

    @property
    def quantization(self) -> str:
        """How the weights are packed: Q4_K_M, float32, ... as llama.cpp names it."""
        number = self.fields.get("general.file_type")
        return _FILE_TYPES.get(number, f"file type {number}") if number is not None else "unknown"

    @property
    def dtype(self) -> str:
        """The dtype that holds the unpacked weights: their own where they are not packed, else bfloat16."""
        return _FLOATS.get(self.fields.get("general.file_type", -1), "bfloat16")

    @property
    def num_params(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def without_tokenizer(self) -> Header:
        """Without what makes the tokenizer, 30 MiB for a vocabulary of 150,000; no header is remembered after this."""
        _read.cache_clear()
        return replace(
            self, fields={key: value for key, value in self.fields.items() if not key.startswith("tokenizer.")}
        )

    def of_model(self, key: str, default: Any = None) -> Any:
        """A setting of the architecture, such as block_count."""
        return self.fields.get(f"{self.architecture}.{key}", default)

    @property
    def context_length(self) -> int | None:
        return self.of_model("context_length")

    @property
    def cached_values(self) -> int:
        """Numbers that the cache keeps of one token, keys and values of all layers."""
        heads = self.of_model("attention.head_count", 1)
        kv_heads = self.of_model("attention.head_count_kv", heads)
        width = self.of_model("embedding_length", 0) // max(1, heads if isinstance(heads, int) else heads[0])
        key, value = self.of_model("attention.key_length", width), self.of_model("attention.value_length", width)
        of_layers = kv_heads if isinstance(kv_heads, list) else [kv_heads] * self.of_model("block_count", 0)
        return sum(of_layers) * (key + value)


def names_gguf(name: str) -> bool:
    """Whether this is a GGUF file by its name, here or on the hub."""
    return name.lower().endswith(".gguf")


def gguf_path(name: str, revision: str | None = None) -> Path:
    """The file of a name: a path, or hub:OWNER/NAME/FILE.gguf, which is downloaded (once).

    Raises ModelError, one line, where there is none.
    """
    if name.startswith(HUB_PREFIX):
        return _downloaded(name, revision)
    if not os.path.isfile(name):
        raise ModelError(
            f"GGUF file {name} does not exist; pass a path, or hub:OWNER/NAME/FILE.gguf for one on the hub."
        )
    return Path(name)


def find_gguf(name: str, revision: str | None = None) -> Header | None:
    """The header of a GGUF file that a name means: the file itself, or that of a folder which `s2t export` wrote; else None.

    Raises ModelError, one line, for a file that does not exist or is none.
    """
    if names_gguf(name) and not os.path.isdir(name):
        return read_header(gguf_path(name, revision))
    path = Path(name) / MODEL_FILE
    return read_header(path) if os.path.isfile(path) else None


def _downloaded(name: str, revision: str | None) -> Path:
    match = _HUB_FILE.fullmatch(name)
    if match is None:
        raise ModelError(f"{name} must be hub:OWNER/NAME/FILE.gguf, a GGUF file of a repository on the hub.")
    from huggingface_hub import hf_hub_download

    with offline_unless_it_answers():
        try:
            return Path(hf_hub_download(match[1], match[2], revision=revision))
        except Exception as error:  # also the HTTP library's own, which differs between versions of the hub's client
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{name} cannot be downloaded: {reason}; see the files of {match[1]} on the hub."
            ) from error


def read_header(path: str | Path) -> Header:
    """Fields and tensor shapes of a GGUF file; raises ModelError for what is none, or is cut short."""
    stat = os.stat(path)
    return _read(str(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _read(path: str, changed: int, size: int) -> Header:
    """The file as it is now: `changed` and `size` tell it from one that has the name later."""
    if size < 24:
        raise ModelError(f"{path} is no GGUF file: it has {size} bytes; get it again.")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            raise ModelError(f"{path} is no GGUF file: it begins with {bytes(data[:4])!r}; get it again.")
        version, num_tensors, num_fields = struct.unpack_from("<IQQ", data, 4)
        if version not in _VERSIONS:
            raise ModelError(f"{path} is of GGUF version {version}; convert it with a current llama.cpp (version 3).")
        try:
            return _parse(Path(path), _Cursor(data, 24), num_tensors, num_fields)
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise ModelError(f"GGUF file {path} is damaged: its header cannot be read; get it again.") from error


def _parse(path: Path, cursor: _Cursor, num_tensors: int, num_fields: int) -> Header:
    fields, shapes = {}, {}
    for _ in range(num_fields):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    for _ in range(num_tensors):
        name, rank = cursor.text(), cursor.number("I")
        if rank > 8:
            raise ModelError(f"GGUF file {path} is damaged: a tensor of {rank} dimensions; get it again.")
        shapes[name] = tuple(reversed(cursor.numbers("Q", rank)))
        cursor.numbers("I", 1)  # its type
        cursor.numbers("Q", 1)  # where it is
    return Header(path, fields, shapes)


@dataclass(slots=True)
class _Cursor:
    """A place in the bytes of a header, moved by what is read."""

    data: Any
    at: int

    def numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        found = struct.unpack_from(f"<{count}{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{count}{kind}")
        return found

    def number(self, kind: str) -> Any:
        return self.numbers(kind, 1)[0]

    def text(self) -> str:
        size = self.number("Q")
        raw = self.data[self.at : self.at + size]
        if len(raw) < size:
            raise IndexError("the file ends")
        self.at += size
        return raw.decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = self.number("I"), self.number("Q")
        if count > len(self.data):
            raise IndexError("the file ends")
        if inner in _SCALARS:
            return list(self.numbers(_SCALARS[inner], count))
        return [self.value(inner) for _ in range(count)]
