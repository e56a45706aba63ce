"""`s2t export`: a folder of GGUF files that runs on both engines, with a threshold of its own, and is checked when loaded."""

from __future__ import annotations

import json
import shutil

import pytest

import s2t
from s2t.cli.main import main
from s2t.model.adapter import read_adapter_config
from s2t.model.gguf.file import read_header

pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install s2t[gguf]", exc_type=ImportError
)

TASK = "rg:gsm_symbolic,max_number=100"


@pytest.fixture(scope="module")
def adapter(save_adapter):
    return save_adapter("tiny:slm", "step", task=TASK, trigger_rate=0.1)


def export(adapter, out, *words):
    return main(["export", "--adapter", str(adapter), "--out", str(out), "--calibration-tokens", "32", *words])


@pytest.fixture(scope="module")
def exported(adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "folder"
    assert export(adapter, out, "--quantization", "q8_0") == 0
    return out


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def test_the_folder_has_what_it_says(exported):
    told = json.loads((exported / "s2t_config.json").read_text())
    assert told["dtype"] == read_header(exported / "model.gguf").quantization == "Q8_0"
    assert {"model.gguf", "lora.gguf", "s2t_adapter/s2t_selector.safetensors"} <= set(told["weights"])
    readme = (exported / "README.md").read_text()
    assert all(f"s2t {word} --slm folder" in readme for word in ("generate", "serve"))


def test_the_threshold_is_that_of_the_file(exported, adapter):
    own = read_adapter_config(exported / "s2t_adapter").thresholds["criticality"]
    assert own != read_adapter_config(adapter).thresholds["criticality"]
    reasoner = s2t.load(str(exported), threads=1)
    assert reasoner.pair.selector_config is not None
    assert reasoner.pair.selector_config.thresholds["criticality"] == own
    answers = reasoner.generate([f"What is {i} + {i + 3}?" for i in range(20)], max_new_tokens=40)
    rate = sum(answer.num_triggered for answer in answers) / sum(len(answer.token_ids) for answer in answers)
    assert 0 < rate < 0.5


def test_both_engines_run_the_folder(exported, capsys):
    told = {}
    for engine in ("llama.cpp", "torch"):
        assert main(["generate", "--slm", str(exported), "--engine", engine, "--json", "What is 3 + 4?"]) == 0
        told[engine] = json.loads(capsys.readouterr().out)
    assert told["llama.cpp"]["engine"]["quantization"] == "Q8_0"
    assert told["llama.cpp"]["engine"]["engine"] == "llama.cpp"
    assert told["torch"]["engine"]["engine"] == "torch"
    assert all(answer["text"] for answer in told.values())


def test_eval_runs_the_folder(exported, tmp_path, capsys):
    words = ["--task", TASK, "--limit", "6", "--max-new-tokens", "24", "--out", str(tmp_path / "eval"), "--json"]
    assert main(["eval", "--slm", str(exported), "--strategies", "greedy,s2t-local", *words]) == 0
    assert {"greedy", "s2t-local"} <= set(json.loads(capsys.readouterr().out)["strategies"])


@pytest.mark.parametrize("name", ["model.gguf", "lora.gguf", "s2t_adapter/s2t_selector.safetensors"])
def test_a_changed_file_is_refused(name, copied, capsys):
    data = bytearray((copied / name).read_bytes())
    data[-1] ^= 1
    (copied / name).write_bytes(data)
    assert main(["generate", "--slm", str(copied), "hi"]) == 2
    assert f"{name} is not the file that was written" in capsys.readouterr().err


def test_an_adapter_that_is_not_what_was_saved_is_not_exported(adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    weights = folder / "s2t_selector.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert export(folder, tmp_path / "out") == 2
    assert "s2t_selector.safetensors is not the file" in capsys.readouterr().err
    weights.unlink()
    assert export(folder, tmp_path / "out") == 2
    assert "s2t_selector.safetensors is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_exported_folder_takes_no_adapter_of_another_base(exported, adapter, tmp_path, capsys):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    told = json.loads((folder / "s2t_config.json").read_text())
    (folder / "s2t_config.json").write_text(json.dumps(told | {"base_fingerprint": "another"}))
    assert main(["generate", "--slm", str(exported), "--adapter", str(folder), "hi"]) == 2
    assert "was trained on tiny:slm (weights another)" in capsys.readouterr().err


def test_a_folder_may_be_called_like_a_file(exported, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "my.gguf")
    assert main(["generate", "--slm", str(folder), "--max-new-tokens", "4", "What is 3 + 4?"]) == 0
    assert main(["generate", "--slm", str(folder), "--revision", "main", "hi"]) == 2
    assert "revision main" in capsys.readouterr().err


def test_answers_without_a_step_behind_the_warmup_set_no_threshold(save_adapter, tmp_path, capsys):
    adapter = save_adapter("tiny:slm", "step", task=TASK, trigger_rate=0.1, warmup_steps=64)
    assert export(adapter, tmp_path / "out") == 2
    assert "the threshold cannot be set anew" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_given_file_is_taken(exported, adapter, tmp_path, capsys):
    words = ["--base-gguf", str(exported / "model.gguf"), "--calibration-problems", "0"]
    assert export(adapter, tmp_path / "taken", *words) == 0
    assert (tmp_path / "taken" / "model.gguf").read_bytes() == (exported / "model.gguf").read_bytes()
    assert export(adapter, tmp_path / "twice", *words, "--quantization", "q4_0") == 2
    assert "is Q8_0 already" in capsys.readouterr().err
    assert not (tmp_path / "twice").exists()


def test_what_cannot_be_exported_is_one_line(save_adapter, gguf_file, tmp_path, random_model, capsys):
    assert export(save_adapter("tiny:slm", "always"), tmp_path / "a") == 2
    assert "scope always" in capsys.readouterr().err
    assert export(save_adapter("tiny:slm"), tmp_path / "b", "--slm", "tiny:llm") == 2
    assert "was trained on tiny:slm" in capsys.readouterr().err
    assert export(save_adapter("tiny:slm"), tmp_path / "c", "--base-gguf", str(gguf_file("tiny:llm"))) == 2
    assert "another base model" in capsys.readouterr().err
    assert export(save_adapter("tiny:slm", trigger_rate=0.1), tmp_path / "d") == 2
    assert "--calibration-problems 0" in capsys.readouterr().err
    assert not any((tmp_path / name).exists() for name in "abcd")
