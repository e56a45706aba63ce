"""Collected groups as others open them: `datasets.load_dataset` has the same groups as our own reader."""

from __future__ import annotations

import numpy as np
import pytest

from s2t import workflows
from s2t.collect import read_groups


def test_load_dataset_has_the_groups_that_we_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="pip install 's2t[eval]'")
    folder = tmp_path / "collect"
    workflows.collect(slm="tiny:slm", llm="tiny:llm", threshold=0.3, limit=12, shard_size=5, out=str(folder))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    files = str(folder / "groups-*.parquet")
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 12, "a trajectory a row, in several files"
    found = []
    for row in rows:
        shape = (-1, row["num_candidates"])
        columns = [np.reshape(row[name], shape) for name in ("candidate_ids", "slm_logprobs", "llm_probs")]
        for step, *group in zip(row["group_steps"], *columns, strict=True):
            prefix = (*row["prompt_ids"], *row["token_ids"][:step])
            found.append(
                (row["problem_id"], prefix, row["divergence"][step], *(tuple(part.tolist()) for part in group))
            )
    ours = [
        (g.provenance.problem_id, g.prefix_ids, g.divergence, g.candidate_ids, g.slm_logprobs, g.llm_probs)
        for g in read_groups(folder)
    ]
    assert ours and found == ours
