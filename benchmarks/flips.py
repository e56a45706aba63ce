"""Where a selector's flips go, read at every step of held-out answers, which it was not trained on: a table of docs/results.md.

    python benchmarks/flips.py --slm Qwen/Qwen2.5-Coder-0.5B-Instruct --run runs/qwen2.5-coder/train --out flips.json

Of every step: does the trigger fire, does the adapter (readout rank, scope step) take another token than the SLM, and is that
the LLM's? Where the models agree within the divergence threshold the SLM's token counts as the LLM's, so that flips away from
it are an upper bound. Per 1,000 steps; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from s2t.config import TrainConfig
from s2t.core.support import entropy, in_parts, propose
from s2t.files import load_run, write_json
from s2t.model.adapter import SelectorAdapter, load_adapter
from s2t.model.load import load_model
from s2t.progress import progress
from s2t.train.dataset import GroupData, Trajectory, make_batch, read_group_data
from s2t.train.forward import _read_beside, _read_prefixes
from s2t.train.validation import split_by_problem

RATES = (0.05, 0.1)
WEIGHTS = (0.25, 0.5, 1.0)
AT_ONCE = 64  # steps read beside one prefix


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slm", help="the base model; what the run was trained on unless given")
    parser.add_argument("--run", required=True, help="folder of `s2t train`")
    parser.add_argument("--groups", help="the groups it was trained on; those that the run names unless given")
    parser.add_argument("--out", help="a JSON file")
    given = parser.parse_args()
    config = TrainConfig(**load_run(Path(given.run), "train")["config"])
    data = read_group_data(given.groups or config.groups, config.num_candidates)
    _, held = split_by_problem(data.trajectories, config.heldout_problems)
    loaded = load_model(given.slm or config.slm, config.dtype)
    adapter = load_adapter(Path(given.run) / "adapter", loaded)
    with progress("read held-out answers", len(held)) as advance:
        parts = []
        for i in held:
            parts.append(read(adapter, data, data.trajectories[i], config.num_candidates))
            advance(1)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    found = {"num_problems": len(held), "num_steps": len(columns["is_point"]), "rows": table(columns)}
    for row in found["rows"]:
        print(" | ".join(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()))
    if given.out:
        write_json(Path(given.out), found)
    print(json.dumps(found))


@torch.inference_mode()
def read(adapter: SelectorAdapter, data: GroupData, t: Trajectory, k: int) -> dict[str, np.ndarray]:
    """Of every step of one answer: what triggers read, both models' log-probabilities of K candidates, the LLM's choice."""
    device, warmup = adapter.loaded.device, data.warmup_steps
    batch = make_batch([t], data.threshold, warmup, device)
    adapter.act(False)
    prefixes = _read_prefixes(adapter, batch.ids)
    states = prefixes.steps(batch)  # [M, H]
    logits = adapter.head(states)[..., : adapter.loaded.vocab_size]
    ids, slm = propose(logits, k)
    rows, columns = batch.step_index
    adapter.act(True)
    readings = []
    for at in range(0, len(states), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        own = make_batch([t], data.threshold, warmup, device, has_ids=False)
        own.group_row, own.prefix_lengths = rows[part], columns[part] + 1
        beside = _read_beside(adapter, batch.step_ids[part, None], columns[part], prefixes.beside(own))
        readings.append(adapter.readings(beside, ids[part]))
    adapter.act(False)
    choice = np.zeros(len(states), dtype=np.int64)  # place of the LLM's token; the SLM's own where they agree
    for step, candidates, probs in zip(t.group_steps - warmup, t.candidate_ids, t.llm_probs, strict=True):
        if step >= 0:
            known = dict(zip(candidates.tolist(), probs.tolist(), strict=True))
            choice[step] = int(np.argmax([known.get(token, 0.0) for token in ids[step].tolist()]))
    return {
        "criticality": adapter.criticality(states).float().cpu().numpy(),
        "entropy": in_parts(entropy, logits).cpu().numpy(),
        "divergence": t.divergence[warmup:],
        "is_point": batch.is_critical.cpu().numpy(),
        "slm": slm.cpu().numpy(),
        "adapter": torch.cat(readings).float().cpu().numpy(),
        "choice": choice,
    }


def table(columns: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Flips per 1,000 steps, by trigger, by the share of steps at which it fires and by the adapter's weight in the score."""
    found = []
    for weight in WEIGHTS:
        chosen = ((1 - weight) * columns["slm"] + weight * columns["adapter"]).argmax(-1)
        for trigger in ("criticality", "entropy", "divergence"):
            for rate in RATES:
                values = columns[trigger]
                flips = (values > np.quantile(values, 1 - rate)) & (chosen != 0)
                to_llm, away = flips & (chosen == columns["choice"]), flips & (columns["choice"] == 0)
                counts = {
                    "to the LLM's": to_llm,
                    "away from it": away,
                    "of these at no divergence point": away & ~columns["is_point"],
                    "to a third": flips & ~to_llm & ~away,
                }
                per_mille = {name: float(1000 * mask.mean()) for name, mask in counts.items()}
                found.append({"trigger": trigger, "fires at": rate, "weight": weight, **per_mille})
    return found


if __name__ == "__main__":
    main()
