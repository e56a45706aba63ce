"""Whatever a user's file or flag holds is used or one line with exit code 2; no parser's own error comes through."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from s2t.cli.main import main
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import load_model

VALUES = [None, True, -1, 2**70, 1e400, "text", "\ud800", [], [1, "a"], {}, {"a": {}}]
TEXTS = ["", "{", "[1]", "[" * 100_000, '{"limit": ' + "9" * 5000 + "}", '{"out": "\\ud800"}', "\0"]


@pytest.fixture
def fails(capsys):
    def run(*words):
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert code == 2, (words, captured.err)
        assert len(captured.err.splitlines()) == 1, captured.err
        assert "Error:" not in captured.err and "--debug" not in captured.err, captured.err
        return captured.err

    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    loaded = load_model("tiny:slm")
    torch.manual_seed(0)
    config = AdapterConfig("tiny:slm", loaded.fingerprint, lora_rank=2, thresholds={"criticality": 0.5})
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    SelectorAdapter(loaded, config).save(folder)
    return folder


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("flag", ["--config", "--calibration"])
def test_a_file_of_settings_that_is_none(flag, text, fails, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    fails("generate", "Hi", "--strategy", "s2t", "--llm", "tiny:llm", flag, tmp_path / "settings.json")


@pytest.mark.parametrize("flag", ["--config", "--calibration", "--adapter", "--slm"])
@pytest.mark.parametrize("path", ["x" * 300, "y/" * 3000, "a/" + "b" * 300])
def test_a_path_that_no_file_can_have(flag, path, fails):
    needs = ["--strategy", "s2t", "--llm", "tiny:llm"] if flag == "--calibration" else ["--threshold", "1"]
    needs = ["--strategy", "s2t-local"] if flag == "--adapter" else needs
    fails("generate", "Hi", *needs, flag, path)


@pytest.mark.parametrize(
    "name", ["--limit", "--seed", "--max-new-tokens", "--batch-size", "--num-samples", "--shard-size"]
)
def test_a_number_that_is_far_too_large(name, fails, tmp_path):
    for number in (2**31, 10**30, 10**400):
        fails("eval", "--strategies", "greedy", name, number, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_any_value_in_a_file_of_settings_is_a_setting_or_one_line(fails, tmp_path):
    for key in ("slm", "limit", "seed", "threshold", "trust_remote_code", "stop", "out", "strategies", "llm_url"):
        for value in VALUES:
            if value is None or (key, value) in [
                ("stop", []),
                ("llm_url", []),
                ("trust_remote_code", True),
                ("stop", "text"),
            ]:
                continue
            (tmp_path / "settings.json").write_text(json.dumps({"slm": "tiny:nothing"} | {key: value}))
            fails("eval", "--config", tmp_path / "settings.json", "--out", tmp_path / "out")


KEYS = [
    "thresholds",
    "num_candidates",
    "heldout_templates",
    "reserved_ids",
    "scope",
    "criticality",
    "lora_rank",
    "weights",
]


@pytest.mark.parametrize("key", KEYS)
def test_any_value_in_an_adapters_config_is_read_or_one_line(key, fails, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    settings = json.loads((folder / "s2t_config.json").read_text())
    for value in (None, "text", 3.5, True, [["x"]], {"a": ["x"]} if key != "thresholds" else 3):
        (folder / "s2t_config.json").write_text(json.dumps(settings | {key: value}))
        fails("generate", "Hi", "--adapter", folder, "--max-new-tokens", "2")


@pytest.mark.parametrize(
    "text", [*TEXTS[:4], '{"status": 3}', '{"command": ["eval"], "status": "complete", "config": 5}']
)
def test_a_manifest_that_is_none(text, fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(text)
    (tmp_path / "run" / "steps-00000.parquet").write_text("")
    fails("calibrate", "--run", tmp_path / "run", "--out", tmp_path / "out")
    fails("train", "--groups", tmp_path / "run", "--out", tmp_path / "out")
    fails("report", "--run", tmp_path / "run")
    fails("eval", "--strategies", "greedy", "--out", tmp_path / "run")
