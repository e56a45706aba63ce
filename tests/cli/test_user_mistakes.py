"""A user's mistake, through the real commands, is one line on stderr, exit code 2, and nothing in the out folder lost."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from s2t.cli.main import main
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model

SHORT = ["--limit", "2", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"question": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter folder of tiny:slm."""
    loaded = load_model("tiny:slm")
    torch.manual_seed(0)
    config = AdapterConfig("tiny:slm", loaded.fingerprint, lora_rank=2, thresholds={"criticality": 0.5})
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    SelectorAdapter(loaded, config).save(folder)
    return folder


@pytest.fixture
def out(tmp_path):
    """An out folder that already holds somebody's work."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("yesterday's results")
    (folder / "table-00007.parquet").write_bytes(b"kept as it is")
    return folder


@pytest.fixture
def mistake(capsys, out):
    """Run a command that must fail; returns its only line. What the folder held is still there, byte for byte."""

    def run(*words):
        before = contents(out)
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert len(lines) == 1, captured.err
        assert captured.out == ""
        assert lines[0].startswith("s2t: error: ")
        after = contents(out)
        assert {path: after.get(path) for path in before} == before
        assert not [path for path in after if path.name.endswith(".tmp")]
        return lines[0]

    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


COMMANDS = {
    "measure": [],
    "collect": ["--threshold", "1"],
    "eval": ["--strategies", "greedy"],
}
every_command = pytest.mark.parametrize("command", COMMANDS)


def words_of(command, task, out, *more):
    return [command, *COMMANDS[command], *SHORT, "--task", task, "--out", out, *more]


@every_command
@pytest.mark.parametrize("name", ["no-such-model", "somebody/no-such-model", "tiny:nothing", "/no/such/folder"])
def test_a_missing_model(command, name, mistake, problems, out):
    assert name in mistake(*words_of(command, problems, out, "--slm", name))


@every_command
def test_a_folder_that_holds_no_model(command, mistake, problems, out, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in mistake(*words_of(command, problems, out, "--slm", tmp_path / "empty"))


@every_command
@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{this is no JSON", "problems.jsonl:3"),
        ("[1, 2]", "problems.jsonl:3"),
        ('{"question": "1 + 1?"}', "problems.jsonl:3"),
    ],
)
def test_a_line_of_problems_that_is_no_problem(command, line, named, mistake, out, tmp_path):
    good = json.dumps({"question": "What is 1 + 2?", "answer": "3"})
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{good}\n{good}\n{line}\n")
    assert named in mistake(*words_of(command, path, out))


def test_a_file_without_problems(mistake, out, tmp_path):
    (tmp_path / "problems.jsonl").write_text("\n")
    assert "problems.jsonl is empty" in mistake(*words_of("eval", tmp_path / "problems.jsonl", out))


@every_command
@pytest.mark.parametrize(
    ("task", "named"),
    [
        ("gsm8q", "did you mean gsm8k"),
        ("rg:no_such_generator", "no_such_generator"),
        ("rg:gsm_symbolic,no_such_option=1", "no_such_option"),
        ("no/such/file.jsonl", "no/such/file.jsonl"),
        ("hub:nobody", "hub:OWNER/NAME"),
    ],
)
def test_an_unknown_task(command, task, named, mistake, out):
    assert named in mistake(*words_of(command, task, out))


def test_an_unknown_split(mistake, problems, out):
    assert "validation" in mistake(*words_of("eval", problems, out, "--split", "validation"))


def test_more_candidates_than_the_vocabulary_has(mistake, problems, out, adapter):
    line = mistake(*words_of("eval", problems, out, "--num-candidates", 5000))
    assert "5000" in line and "--num-candidates" in line
    words = ["generate", "1 + 1?", "--strategy", "s2t-local", "--adapter", adapter, "--num-candidates", 5000]
    assert "5000" in mistake(*words)


def test_an_adapter_of_another_base_model(mistake, problems, out, adapter):
    words = words_of(
        "eval", problems, out, "--slm", "tiny:llm", "--strategies", "greedy,s2t-local", "--adapter", adapter
    )
    assert "--slm tiny:slm" in mistake(*words)


def test_a_folder_that_is_no_adapter(mistake, problems, out, tmp_path):
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "s2t_config.json").write_text("{}")
    said = {
        tmp_path: "is no adapter folder",
        tmp_path / "nothing": "does not exist",
        tmp_path / "run": "its adapter is",
    }
    for folder, what in said.items():
        words = words_of("eval", problems, out, "--strategies", "s2t-local", "--adapter", folder)
        assert what in mistake(*words)


def test_a_damaged_adapter(mistake, problems, out, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"cut")
    words = words_of("eval", problems, out, "--strategies", "s2t-local", "--adapter", tmp_path / "damaged")
    assert "is damaged" in mistake(*words)


def test_an_adapter_of_the_very_problems(mistake, problems, out, adapter, tmp_path):
    from s2t.tasks.problems import load_task

    shutil.copytree(adapter, tmp_path / "trained")
    hashes = [p.problem_id[-16:] for p in load_task(str(problems)).problems("test", 2, 0)]
    (tmp_path / "trained" / "train_problems.txt").write_text("\n".join(hashes))
    words = words_of("eval", problems, out, "--strategies", "s2t-local", "--adapter", tmp_path / "trained")
    assert hashes[0] in mistake(*words)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--strategies", "greedy,s2t", "--threshold", 1], "pass --llm"),
        (["--strategies", "s2t-local", "--threshold", 1], "without one: --strategies greedy"),
        (["--revision", "v2"], "revision v2"),
        (["--strategies", "s2t", "--llm", "tiny:llm"], "no threshold"),
        (["--strategies", "s2t", "--llm", "tiny:llm", "--calibration", "/no/calibration.json"], "/no/calibration.json"),
        (["--device", "cuda:9"], "cuda:9"),
        (["--strategies", ""], "strategies"),
    ],
)
def test_settings_that_do_not_fit(more, named, mistake, problems, out):
    assert named in mistake(*words_of("eval", problems, out, *more))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["calibrate", "--run", "/no/such/run"], "run s2t measure"),
        (["train", "--groups", "/no/such/run"], "run s2t collect"),
        (["report", "/no/such/run"], "/no/such/run"),
        (["collect", "--task", "gsm8k"], "--calibration"),
    ],
)
def test_a_step_that_was_left_out(words, named, mistake, out):
    assert named in mistake(*words, "--out", out)


@every_command
def test_an_out_folder_that_cannot_be_written(command, mistake, problems, tmp_path):
    file = tmp_path / "file"
    file.write_text("a regular file")
    assert str(file) in mistake(*words_of(command, problems, file / "run"))
    assert file.read_text() == "a regular file"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
@every_command
def test_an_out_folder_without_permission(command, mistake, problems, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "Permission denied" in mistake(*words_of(command, problems, locked / "run"))


def test_a_mistake_can_be_corrected_with_the_same_out_folder(mistake, problems, tmp_path, capsys):
    out = tmp_path / "run"
    mistake(*words_of("eval", problems, out, "--slm", "tiny:nothing"))
    assert main([str(word) for word in words_of("eval", problems, out)]) == 0
    capsys.readouterr()
    before = contents(out)
    line = mistake(*words_of("eval", problems, out, "--seed", 1))
    assert "seed=0, now seed=1" in line
    assert contents(out) == before
    assert "belongs to s2t eval" in mistake(*words_of("collect", problems, out))
    assert contents(out) == before
