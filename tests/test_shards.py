"""A finished run is read only as it was written; a failed one stands in nobody's way; a read-only one can be read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t import files
from s2t.cli.main import COMMANDS, main
from s2t.collect import collect, read_groups
from s2t.config import CalibrateConfig, CollectConfig, EvalConfig, MeasureConfig
from s2t.errors import DataError
from s2t.evaluate import evaluate
from s2t.files import RunFolder, load_run
from s2t.measure import calibrate, measure
from s2t.train.dataset import read_group_data

COMMON = {"limit": 9, "max_new_tokens": 16, "shard_size": 3}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with small finished runs, and the configs that made them."""
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"question": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(200)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {**COMMON, "task": str(folder / "problems.jsonl")}
    configs = {
        "measure": MeasureConfig(**common, out=str(folder / "measure"), quantile=0.5),
        "calibrate": CalibrateConfig(run=str(folder / "measure"), out=str(folder / "calibrate"), quantile=0.5),
        "collect": CollectConfig(**common, out=str(folder / "collect"), threshold=0.01),
        "eval": EvalConfig(**common, out=str(folder / "eval"), strategies="greedy,sample", num_traces=4),
    }
    for name, config in configs.items():
        RUN[name](config)
    return folder, configs


RUN = {"measure": measure, "calibrate": calibrate, "collect": collect, "eval": evaluate}
READ = {
    "collect": lambda folder: (read_group_data(str(folder), 4), list(read_groups(folder))),
    "measure": lambda folder: calibrate(CalibrateConfig(run=str(folder), out=str(folder) + "-c")),
}
HARM = {
    "gone": lambda first, second: second.unlink(),
    "doubled": lambda first, second: shutil.copy(first, first.with_name(first.name.replace("00000", "00003"))),
    "doubled under another name": lambda first, second: shutil.copy(first, first.with_stem(first.stem + " (1)")),
    "in place of another": shutil.copy,
    "swapped": lambda first, second: (first.rename("s"), second.rename(first)),
    "cut": lambda first, second: second.write_bytes(second.read_bytes()[:-20]),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("command", READ)
def test_a_run_whose_shards_are_not_those_it_wrote_is_refused(command, harm, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(runs[0] / command, tmp_path / "copy")
    READ[command](copy)
    first, second, *_ = sorted(copy.glob("*-0000?.parquet"))
    HARM[harm](first, second)
    with pytest.raises(DataError, match="no longer what s2t") as raised:
        READ[command](copy)
    assert "-0000" in str(raised.value)


def test_older_runs_without_a_list_are_counted(runs, tmp_path):
    copy = shutil.copytree(runs[0] / "collect", tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["shards"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    read_group_data(str(copy), 4)
    shutil.copy(copy / "groups-00000.parquet", copy / "groups-00001.parquet")
    with pytest.raises(DataError, match="one a problem"):
        read_group_data(str(copy), 4)


@given(st.dictionaries(st.sampled_from("abcdef"), st.binary(max_size=3), min_size=1), st.data())
def test_any_change_of_any_shard_is_noticed(tmp_path_factory, contents, data):
    folder = tmp_path_factory.mktemp("run")
    run = RunFolder.open(folder, "collect", EvalConfig())
    for place, content in enumerate(contents.values()):
        run.shard("groups", place, "parquet").write_bytes(content)
    run.finish()
    load_run(folder, "collect")
    changed = run.shard("groups", data.draw(st.integers(0, len(contents))), "parquet")
    before = changed.read_bytes() if changed.exists() else None
    after = data.draw(st.none() | st.binary(max_size=3))
    changed.unlink(missing_ok=True) if after is None else changed.write_bytes(after)
    if after == before:
        load_run(folder, "collect")
    else:
        with pytest.raises(DataError, match=changed.name):
            load_run(folder, "collect")


@pytest.mark.parametrize("command", RUN)
def test_a_complete_run_on_a_read_only_disk_can_be_read(command, runs, monkeypatch):
    folder, configs = runs
    expected = RUN[command](configs[command])

    def refuse(path, write):
        raise DataError(f"{path} cannot be written: Read-only file system")

    monkeypatch.setattr(files, "_write_atomically", refuse)
    assert RUN[command](configs[command]) == expected
    load_run(folder / command, command)
    if command == "collect":
        assert read_group_data(str(folder / "collect"), 4).num_groups > 0


@pytest.mark.parametrize("others", [[], ["notes.txt"]])
def test_a_failed_command_does_not_stand_in_the_way(others, runs, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for name in others:
        (out / name).write_text("mine")
    words = ["--task", str(runs[0] / "problems.jsonl"), "--limit", "2", "--max-new-tokens", "4", "--out", str(out)]
    assert main(["eval", "--strategies", "greedy", "--slm", "no-such-model", *words]) == 2
    assert main(["measure", *words, "--slm", "no-such-model"]) == 2
    assert main(["eval", "--strategies", "greedy", *words]) == 0
    capsys.readouterr()
    assert main(["measure", *words]) == 2  # now there is work
    assert "belongs to s2t eval" in capsys.readouterr().err


BAD_OUT = {"empty": "", "long": "x" * 300, "deep": "y/" * 3000, "of no text": "a\0b"}


@pytest.mark.parametrize("kind", BAD_OUT)
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"bench", "chat", "generate", "serve"}))
def test_an_out_that_is_no_folder_is_one_line(command, kind, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text('title = "x"\n[[stage]]\nname = "m"\ncommand = "measure"\n')
    more = {
        "collect": ["--threshold", "1"],
        "calibrate": ["--run", str(runs[0] / "measure")],
        "train": ["--groups", str(runs[0] / "collect"), "--num-candidates", "4"],
        "report": ["--run", str(runs[0] / "eval")],
        "study": ["sufficiency"],
        "reproduce": ["r.toml"],
    }
    assert main([command, *more.get(command, []), "--out", BAD_OUT[kind]]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1, captured.err
    assert not captured.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.toml"]


def test_a_loss_that_is_no_number_ends_the_training(runs, tmp_path, capsys):
    words = ["--groups", str(runs[0] / "collect"), "--num-candidates", "4", "--out", str(tmp_path / "train")]
    assert main(["train", *words, "--learning-rate", "1e30", "--lora-rank", "2", "--epochs", "20"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite" in line and "--learning-rate" in line
    assert not (tmp_path / "train" / "adapter").exists()


def test_settings_that_differ_are_still_refused(runs):
    from s2t.errors import ConfigError

    with pytest.raises(ConfigError, match="was made with limit=9"):
        collect(replace(runs[1]["collect"], limit=8))
