"""Run folders and atomic files: laws of what is on disk before, during and after a run."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from s2t import files
from s2t.config import EvalConfig
from s2t.errors import ConfigError, DataError
from s2t.files import RunFolder, load_run


@dataclass(frozen=True)
class ExampleConfig:
    out: str = "runs/x"
    limit: int = 5
    rates: tuple[float, ...] = (0.5, 0.25)
    seed: int = 3


def test_what_is_written_is_read_back(tmp_path: Path):
    files.write_json(tmp_path / "a" / "x.json", {"rate": np.float32(0.5), "ids": np.arange(3), "at": tmp_path})
    assert files.read_json(tmp_path / "a" / "x.json") == {"rate": 0.5, "ids": [0, 1, 2], "at": str(tmp_path)}
    files.write_text(tmp_path / "x.jsonl", '{"a": "é\\u2028"}\n\n{"a": 2}\n')
    assert files.read_jsonl(tmp_path / "x.jsonl") == [{"a": "é\u2028"}, {"a": 2}]
    table = pa.table({"step": [1, 2], "value": [0.5, 1.5]})
    for name in ("s-00000.parquet", "s-00001.parquet"):
        files.write_table(tmp_path / name, table)
    both = files.read_tables([tmp_path / "s-00000.parquet", tmp_path / "s-00001.parquet"], columns=["value"])
    assert both.to_pydict() == {"value": [0.5, 1.5, 0.5, 1.5]}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.json"
    files.write_json(path, {"version": 1})

    def full_disk(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full_disk)
    with pytest.raises(DataError, match=r"x\.json cannot be written: No space left on device"):
        files.write_json(path, {"version": 2})
    assert files.read_json(path) == {"version": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["x.json"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError) as caught:
        RunFolder.open(tmp_path / "file" / "run", "eval", ExampleConfig())
    assert "\n" not in str(caught.value)


def test_an_unserialisable_document_leaves_no_file(tmp_path: Path):
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "x.json", {"bad": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "place"),
    [('{"a": 1}\n{oops\n', "x.jsonl:2 is not JSON"), ("\n[1]\n", "x.jsonl:2 must be one JSON")],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path: Path, content: str, place: str):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(DataError, match=place):
        files.read_jsonl(tmp_path / "x.jsonl")


def test_missing_and_damaged_files_are_data_errors(tmp_path: Path):
    (tmp_path / "x.json").write_text("{")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    for read in (
        lambda: files.read_json(tmp_path / "x.json"),
        lambda: files.read_json(tmp_path / "absent.json"),
        lambda: files.read_tables([tmp_path / "x.parquet"]),
        lambda: files.read_tables([tmp_path / "absent.parquet"]),
        lambda: files.read_tables([]),
    ):
        with pytest.raises(DataError):
            read()


def test_a_missing_column_is_named(tmp_path: Path):
    files.write_table(tmp_path / "x.parquet", pa.table({"step": [1]}))
    with pytest.raises(DataError, match="no column rank; it has step"):
        files.read_tables([tmp_path / "x.parquet"], columns=["rank"])


def test_the_same_run_reopens_and_keeps_its_creation_time(tmp_path: Path):
    first = RunFolder.open(tmp_path / "run", "eval", ExampleConfig())
    files.write_json(first.file("manifest.json"), first.manifest | {"created": "long ago"})
    again = RunFolder.open(tmp_path / "run", "eval", ExampleConfig())
    assert again.manifest["created"] == "long ago"
    assert again.manifest["seed"] == 3
    assert again.manifest["status"] == "running"
    assert not again.is_complete


@pytest.mark.parametrize(
    ("command", "config", "message"),
    [
        ("train", ExampleConfig(), "belongs to s2t eval, not s2t train"),
        ("eval", ExampleConfig(limit=6), "limit=5, now limit=6"),
        ("eval", ExampleConfig(rates=(0.5,)), r"rates=\[0.5, 0.25\], now rates=\[0.5\]"),
    ],
)
def test_another_command_or_config_is_refused(tmp_path: Path, command: str, config: ExampleConfig, message: str):
    files.write_text(RunFolder.open(tmp_path, "eval", ExampleConfig()).file("results.jsonl"), "")
    with pytest.raises(ConfigError, match=message):
        RunFolder.open(tmp_path, command, config)


def test_a_run_that_wrote_nothing_gives_its_folder_up(tmp_path: Path):
    """So that a command with a mistyped setting can be corrected and repeated with the same --out."""
    RunFolder.open(tmp_path, "eval", ExampleConfig(limit=6))
    run = RunFolder.open(tmp_path, "eval", ExampleConfig())
    assert run.manifest["config"]["limit"] == 5
    run.finish()
    with pytest.raises(ConfigError, match="limit=5, now limit=6"):
        RunFolder.open(tmp_path, "eval", ExampleConfig(limit=6))


def test_ignored_keys_may_differ(tmp_path: Path):
    RunFolder.open(tmp_path, "eval", ExampleConfig())
    run = RunFolder.open(tmp_path, "eval", replace(ExampleConfig(), limit=9), ignore=("limit",))
    assert run.manifest["config"]["limit"] == 9


def test_a_folder_is_final_only_after_finish(tmp_path: Path):
    run = RunFolder.open(tmp_path, "eval", ExampleConfig())
    with pytest.raises(DataError, match="unfinished run"):
        load_run(tmp_path, "eval")
    run.finish(num_problems=7)
    assert load_run(tmp_path, "eval")["num_problems"] == 7
    assert RunFolder.open(tmp_path, "eval", ExampleConfig()).is_complete
    with pytest.raises(DataError, match="must be a folder written by s2t train"):
        load_run(tmp_path, "train")
    with pytest.raises(DataError, match="not a run folder"):
        load_run(tmp_path / "elsewhere", "eval")


def test_shards_come_in_order_and_leave_other_files_out(tmp_path: Path):
    run = RunFolder.open(tmp_path, "collect", ExampleConfig())
    for index in (10, 2, 0):
        files.write_text(run.shard("groups", index, "parquet"), "")
    for name in (
        "groups-x.parquet",
        "groups-00001.json",
        ".groups-00003.parquet.ab12.tmp",
        "groups-.parquet",
    ):
        files.write_text(run.file(name), "")
    names = [path.name for path in run.shards("groups", "parquet")]
    assert names == ["groups-00000.parquet", "groups-00002.parquet", "groups-00010.parquet"]


def test_versions_are_known_without_importing_torch():
    code = (
        "import json, sys; from s2t.files import versions; found = versions();"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules; print(json.dumps(found))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"s2t", "python", "torch", "transformers", "peft", "platform"} <= json.loads(shown.stdout).keys()


def test_lines_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.jsonl"
    files.write_lines(path, (json.dumps(i) for i in range(3)))
    assert path.read_text() == "0\n1\n2\n"
    with pytest.raises(ZeroDivisionError):
        files.write_lines(path, (str(1 // i) for i in (1, 0)))
    assert path.read_text() == "0\n1\n2\n" and list(tmp_path.iterdir()) == [path]


def test_a_line_that_is_not_text_is_named_by_its_place(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"b": "\xff"}\n')
    lines = files.iter_jsonl(tmp_path / "x.jsonl")
    assert next(lines) == (f"{tmp_path}/x.jsonl:1", {"a": 1})
    with pytest.raises(DataError, match="not UTF-8 text \\(byte 16\\)"):
        next(lines)


def test_a_finished_run_holds_nothing_half_written(tmp_path):
    run = RunFolder.open(tmp_path, "eval", EvalConfig())
    (tmp_path / ".checkpoint.safetensors.78db7774.tmp").write_bytes(b"half")
    (tmp_path / ".hidden").write_text("the user's")
    run.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "manifest.json"]
