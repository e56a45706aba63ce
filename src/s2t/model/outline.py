"""A model without its weights: tokenizer, stop ids and size, for a model that runs somewhere else."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from s2t.model.chat import stop_ids
from s2t.model.gguf.file import Header, find_gguf
from s2t.model.gguf.tokenizer import load_tokenizer, stop_ids_of
from s2t.model.gguf.weights import GgufFlops
from s2t.model.load import check_is_no_file, load_without_weights, one_line, quiet
from s2t.model.loaded import FlopCount
from s2t.model.reserved import choose_reserved_ids
from s2t.model.tiny import embedded_path, is_embedded


@dataclass(frozen=True)
class Outline:
    """What is known of a model from its folder or hub id alone; `num_params` and `flops` where it has a config."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    stop_ids: frozenset[int]
    num_params: int | None = None
    flops: FlopCount | None = None

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that are never to be generated."""
        reserved = choose_reserved_ids(self.tokenizer.get_vocab(), self.vocab_size, 16)
        return tuple(i for i in reserved.all if i < self.vocab_size)


def load_outline(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Outline:
    """Read tokenizer and config of a hub id, a folder or an embedded model; raises ModelError, one line, without a tokenizer."""
    source = str(embedded_path(name)) if is_embedded(name) else name
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    check_is_no_file(name)
    with quiet(), one_line(name, revision):
        if (header := find_gguf(source, revision)) is not None:
            return _of_gguf(name, header)
        try:
            known = load_without_weights(name, revision, trust_remote_code)
        except Exception:  # whatever a config raises: a tokenizer alone is enough
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            return Outline(name, tokenizer, max(tokenizer.get_vocab().values()) + 1, stop_ids(tokenizer, None))
    return Outline(name, known.tokenizer, known.vocab_size, known.stop_ids, known.num_params, known.flops)


def _of_gguf(name: str, header: Header) -> Outline:
    tokenizer = load_tokenizer(header)
    size = max(tokenizer.get_vocab().values()) + 1
    return Outline(
        name, tokenizer, size, stop_ids(tokenizer, stop_ids_of(header)), header.num_params, GgufFlops(header)
    )
