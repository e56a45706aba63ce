"""What is asked for is done or refused, never left aside: settings without effect, studies without a name, the embedded model."""

from __future__ import annotations

import pytest

import s2t
from s2t.cli.main import main
from s2t.errors import ConfigError
from s2t.studies import STUDIES

REFUSED = {
    "temperature": ["generate", "Hi", "--strategy", "greedy", "--temperature", "0.7"],
    "temperature ": ["generate", "Hi", "--temperature", "0.9"],
    "top_p": ["generate", "Hi", "--strategy", "llm", "--llm", "tiny:llm", "--top-p", "0.9"],
    "top_k": ["chat", "--strategy", "greedy", "--top-k", "5"],
    "min_p": ["eval", "--strategies", "greedy", "--min-p", "0.1"],
    "num_samples": ["generate", "Hi", "--strategy", "sample", "--num-samples", "3"],
    "trigger": ["generate", "Hi", "--strategy", "greedy", "--trigger", "entropy"],
    "threshold": ["eval", "--strategies", "greedy,self-consistency", "--threshold", "0.5"],
    "temperature  ": ["collect", "--temperature", "0.5", "--threshold", "1"],
    "adapter": ["collect", "--adapter", "runs/x", "--threshold", "1"],
    "kd_temperature": ["distill", "--kd-temperature", "2"],
    "support_size": ["distill", "--support-size", "8"],
    "temperature   ": ["distill", "--temperature", "2"],
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_has_no_effect_is_refused(setting, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda _: "Hi")
    assert main(REFUSED[setting]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and not captured.out
    assert f"{setting.strip()} has no effect" in captured.err
    assert not list(tmp_path.iterdir())


def test_python_refuses_them_too():
    reasoner = s2t.load("tiny:slm")
    for call in (reasoner.generate, reasoner.stream):
        with pytest.raises(ConfigError, match="temperature has no effect with strategy greedy"):
            call("1 + 1?", temperature=0.5)
    assert reasoner.generate("1 + 1?", "sample", temperature=0.5, top_k=3, max_new_tokens=2).token_ids


def test_a_config_file_may_hold_what_has_no_effect(tmp_path, capsys):
    """A manifest has every setting, those at their defaults too."""
    (tmp_path / "c.json").write_text('{"temperature": 0.7, "max_new_tokens": 2}')
    assert main(["generate", "1 + 1?", "--config", str(tmp_path / "c.json")]) == 0
    capsys.readouterr()


def test_a_study_without_a_name_lists_the_studies(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["study"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in STUDIES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["generate", "1 + 1?"], ["chat"], ["generate", "1 + 1?", "--json"]])
def test_the_embedded_model_says_that_it_answers(words, capsys, monkeypatch):
    questions = iter(["1 + 1?", "2 + 2?"])

    def ask(_):
        try:
            return next(questions)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    assert main([*words, "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("tiny:slm answers") == 1
    assert "tiny:slm answers" not in captured.out


def test_a_model_of_ones_own_answers_without_a_word(random_model, tmp_path, capsys):
    loaded = random_model()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["generate", "1 + 1?", "--slm", str(tmp_path), "--max-new-tokens", "4"]) == 0
    assert not capsys.readouterr().err
