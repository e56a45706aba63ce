"""`s2t merge` through the real command: the folder serves every command as --slm; mistakes are one line and exit code 2."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from s2t.cli.main import main
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model

SHORT = ["--limit", "2", "--max-new-tokens", "8"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter folder of tiny:slm that triggers everywhere."""
    loaded = load_model("tiny:slm")
    torch.manual_seed(0)
    config = AdapterConfig("tiny:slm", loaded.fingerprint, lora_rank=2, thresholds={"criticality": 0.1})
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    SelectorAdapter(loaded, config).save(folder)
    return folder


@pytest.fixture(scope="module")
def merged(adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "model"
    assert main(["merge", "--adapter", str(adapter), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"question": f"What is {n} + {n + 1}?", "answer": str(2 * n + 1)} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *words):
    """The JSON document of a command that must work."""
    capsys.readouterr()
    assert main([*(str(word) for word in words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_merge_says_what_it_made(adapter, tmp_path, capsys):
    assert main(["merge", "--adapter", str(adapter), "--slm", "tiny:slm", "--out", str(tmp_path / "merged")]) == 0
    captured = capsys.readouterr()
    shown = "".join(captured.out.split())  # a long path takes two lines
    assert str(tmp_path / "merged") in shown and "candidates" in shown
    assert captured.err == ""


def test_generate_selects_with_a_merged_folder_alone(merged, adapter, capsys):
    alone = run(capsys, "generate", "What is 1 + 2?", "--slm", merged, "--max-new-tokens", "8")
    beside = run(capsys, "generate", "What is 1 + 2?", "--adapter", adapter, "--max-new-tokens", "8")
    assert alone == beside and alone["num_triggered"] > 0
    greedy = run(capsys, "generate", "What is 1 + 2?", "--slm", merged, "--strategy", "greedy", "--max-new-tokens", "8")
    assert greedy["num_triggered"] == 0


def test_eval_of_a_merged_folder_is_that_of_the_adapter(merged, adapter, problems, tmp_path, capsys):
    words = ["eval", *SHORT, "--task", problems, "--strategies", "greedy,s2t-local"]
    alone = run(capsys, *words, "--slm", merged, "--out", tmp_path / "alone")
    beside = run(capsys, *words, "--adapter", adapter, "--out", tmp_path / "beside")
    for name in ("greedy", "s2t-local"):
        same = {key: value for key, value in alone["strategies"][name].items() if key != "seconds"}
        assert same == {key: value for key, value in beside["strategies"][name].items() if key != "seconds"}
    assert (
        main(["merge", "--adapter", str(adapter), "--out", str(tmp_path / "m"), "--eval", str(tmp_path / "beside")])
        == 0
    )
    assert "95 % interval" in (tmp_path / "m" / "README.md").read_text()


def test_eval_puts_its_accuracies_into_the_adapters_card_and_merge_takes_them(adapter, problems, tmp_path, capsys):
    own = shutil.copytree(adapter, tmp_path / "adapter")
    words = ["eval", *SHORT, "--task", problems, "--adapter", own, "--out", tmp_path / "run"]
    run(capsys, *words)
    assert (own / "README.md").read_text() == (adapter / "README.md").read_text()
    summary = run(capsys, *words, "--card")  # a finished run can still be put into a card
    card = (own / "README.md").read_text()
    low, high = summary["strategies"]["s2t-local"]["ci95"]
    assert f"| {100 * low:.1f} to {100 * high:.1f} | 2 |" in card and "## Settings" in card
    assert run(capsys, "generate", "1 + 2?", "--adapter", own, "--max-new-tokens", "4")["text"]
    found = run(capsys, "merge", "--adapter", own, "--out", tmp_path / "merged")
    assert found["eval"]["strategies"].keys() == {"greedy", "s2t-local"}
    assert "## Accuracy" in (tmp_path / "merged" / "README.md").read_text()


def test_collect_with_the_selector_of_a_merged_folder(merged, problems, tmp_path, capsys):
    words = ["collect", *SHORT, "--task", problems, "--threshold", "0.1", "--policy", "s2t-local", "--workers", "1"]
    assert run(capsys, *words, "--slm", merged, "--out", tmp_path / "run")["num_problems"] == 2


@pytest.fixture
def mistake(capsys):
    """Run a command that must fail; returns its only line."""

    def run(*words):
        capsys.readouterr()
        assert main([str(word) for word in words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("s2t: error: ")
        return line

    return run


def test_folders_that_are_no_adapter(mistake, merged, tmp_path):
    assert "no adapter folder" in mistake("merge", "--adapter", tmp_path, "--out", tmp_path / "out")
    assert "is a merged model, not an adapter" in mistake("merge", "--adapter", merged, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_model(mistake, adapter, tmp_path):
    words = ["merge", "--adapter", adapter, "--out", tmp_path / "out"]
    assert "pass --slm tiny:slm" in mistake(*words, "--slm", "tiny:llm")
    assert "tiny:nothing" in mistake(*words, "--slm", "tiny:nothing")
    assert "dtype" in mistake(*words, "--dtype", "int3")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_else(mistake, adapter, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    words = ["merge", "--adapter", adapter, "--out"]
    assert "is no merged model; choose another --out" in mistake(*words, tmp_path)
    assert "is no merged model; choose another --out" in mistake(*words, tmp_path, "--overwrite")
    assert "is no merged model" in mistake(*words, tmp_path / "notes.txt", "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_merge_that_is_there_already(mistake, merged, adapter):
    assert "pass --overwrite" in mistake("merge", "--adapter", adapter, "--out", merged)


def test_an_eval_run_of_something_else(mistake, adapter, tmp_path):
    words = ["merge", "--adapter", adapter, "--out", tmp_path / "out", "--eval"]
    assert "run s2t eval" in mistake(*words, tmp_path)


def test_a_damaged_merged_folder(mistake, merged, tmp_path):
    folder = shutil.copytree(merged, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors is not the file that was written" in mistake("generate", "hello", "--slm", folder)


def test_a_card_without_an_adapters_folder(mistake, problems, tmp_path):
    words = ["eval", *SHORT, "--task", problems, "--strategies", "greedy", "--out", tmp_path / "run", "--card"]
    assert "--card writes into an adapter's folder; pass --adapter" in mistake(*words)
    assert "--card writes into the adapter's folder" in mistake(*words, "--adapter", "somebody/adapter")


def test_problems_it_was_trained_on(mistake, merged, problems, tmp_path):
    from s2t.tasks.problems import load_task

    folder = shutil.copytree(merged, tmp_path / "copy")
    hashes = [p.problem_id[-16:] for p in load_task(str(problems)).problems("test", 2, 0)]
    (folder / "s2t_adapter" / "train_problems.txt").write_text("\n".join(hashes))
    words = ["eval", *SHORT, "--task", problems, "--slm", folder, "--strategies", "s2t-local"]
    assert hashes[0] in mistake(*words, "--out", tmp_path / "out")
