"""What tokens cost on a model in a GGUF file, counted as the torch engine does."""

from __future__ import annotations

from s2t.model.flops import FlopCount
from s2t.model.gguf.file import Header


class GgufFlops(FlopCount):
    """As the torch engine counts, from the shapes in a file's header."""

    def __init__(self, header: Header) -> None:
        embedding = header.shapes.get("token_embd.weight", (0, 0))
        is_tied = "output.weight" not in header.shapes
        size = embedding[0] * embedding[1]
        self.per_token = 2.0 * (header.num_params - (0 if is_tied else size))
        self.per_attended = 4.0 * header.of_model("block_count", 0) * header.of_model("embedding_length", 0)
