"""A branch ahead of some rows: one candidate each, continued greedily, read and forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from s2t.methods.base import Ahead
from s2t.model.engine import Engine


@torch.inference_mode()
def branch(engine: Engine, rows: Sequence[int], first: Tensor, depth: int, reads_end: bool) -> Ahead:
    """One branch of each row: its candidate [f] and the greedy tokens behind it, `depth` in all or to a stop id.

    What comes back has no axis of candidates: states [f, H] of the last tokens, under the adapter, log-probabilities and counts
    [f]. The rows are as before.
    """
    lengths = [engine.lengths[row] for row in rows]
    last = first.clone()
    logprobs, counts = torch.zeros(len(rows), device=last.device), torch.ones(len(rows), device=last.device)
    for _ in range(depth - 1):
        live = [i for i, token in enumerate(last.tolist()) if token not in engine.loaded.stop_ids]
        if not live:
            break
        hidden = engine.extend([rows[i] for i in live], [[int(last[i])] for i in live])
        best = engine.logits(hidden).log_softmax(-1).max(-1)
        last[live], counts[live] = best.indices, counts[live] + 1
        logprobs[live] += best.values
    states = engine.branch(rows, last[:, None])[:, 0] if reads_end else None
    engine.crop(rows, lengths)
    return Ahead(states, logprobs, counts)
