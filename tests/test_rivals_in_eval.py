"""`s2t eval` runs every method by name on the embedded pair, and a run that lost shards writes the same results again."""

from __future__ import annotations

from pathlib import Path

from s2t.config import EvalConfig
from s2t.evaluate import evaluate
from s2t.files import read_json

METHODS = (
    *(
        "speculative",
        "specreason",
        "smart",
        "glimprouter",
        "relay",
        "contrastive",
        "context-aware",
        "dola",
        "multiplex",
    ),
    *("takeover@step-entropy", "confidence"),
)


def test_every_method_runs_by_name_and_resumed_is_whole(tmp_path):
    config = EvalConfig(
        llm="tiny:llm", strategies=",".join(METHODS), limit=3, shard_size=2, max_new_tokens=32, out=str(tmp_path)
    )
    scores = evaluate(config)["strategies"]
    whole = Path(config.out, "results.jsonl").read_bytes()
    assert set(scores) == set(METHODS)
    assert {scores[name]["num_problems"] for name in METHODS} == {3}
    reads = {name for name in METHODS if scores[name]["llm_forwards"]}
    assert {"speculative", "specreason", "contrastive"} <= reads
    assert not reads & {"context-aware", "dola", "multiplex", "confidence"}
    for name in METHODS:
        (tmp_path / f"results-{name}-00001.json").unlink()
    manifest = read_json(tmp_path / "manifest.json")
    assert manifest["status"] == "complete"
    evaluate(config)
    assert Path(config.out, "results.jsonl").read_bytes() == whole
