"""The command line: instant help, one line per mistake, exit codes, JSON; workflows are replaced by fakes."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import types
from dataclasses import MISSING, dataclass, fields

import pytest
import typer

from s2t.cli import demo as demo_cli
from s2t.cli import main as cli
from s2t.cli import report as report_cli
from s2t.cli.options import field_docs
from s2t.cli.output import json_text
from s2t.config import (
    CalibrateConfig,
    CollectConfig,
    EvalConfig,
    GenerateConfig,
    MeasureConfig,
    MergeConfig,
    PushConfig,
    ServeConfig,
    TrainConfig,
)
from s2t.errors import DataError, ModelError
from s2t.records import Cost, Step

HEAVY = ("torch", "transformers", "numpy", "pyarrow", "peft", "datasets")
CONFIGS = {
    "demo": demo_cli.DemoConfig,
    "measure": MeasureConfig,
    "calibrate": CalibrateConfig,
    "collect": CollectConfig,
    "train": TrainConfig,
    "merge": MergeConfig,
    "push": PushConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "chat": GenerateConfig,
    "eval": EvalConfig,
    "report": report_cli.ReportConfig,
}
MERGED = {
    "folder": "x/merged",
    "adapter": {"base_model": "tiny:slm", "scope": "always"},
    "dtype": "float32",
    "weights": {"model.safetensors": "0a"},
}
MEASURED = {
    "num_steps": 1000,
    "num_divergence_points": 50,
    "trigger_rate": 0.05,
    "threshold": 1.5,
    "quantile": 0.95,
    "hit_rate": {"1": 0.3, "8": 0.96},
    "hit_rate_ci95": {"1": [0.2, 0.4], "8": [0.9, 0.99]},
    "hit_rate_by_divergence": [{"low": 0.0, "high": 0.5, "num_steps": 10, "hit_rate": {"1": 0.9, "8": 1.0}}],
}
SCORES = {"accuracy": 0.5, "ci95": [0.4, 0.6], "num_problems": 100, "slm_tokens": 12345, "seconds": 1.5}
SUMMARY = {
    "task": "rg:gsm_symbolic",
    "seed": 0,
    "num_test": 100,
    "strategies": {"greedy": SCORES, "s2t-local": {**SCORES, "accuracy": 0.75}},
    "paired": {
        "s2t-local vs greedy": {
            "difference": 0.25,
            "ci95": [0.1, 0.4],
            "p_value": 0.01,
            "wins": 30,
            "losses": 5,
        }
    },
    "unseen_templates": {"num_problems": 20, "strategies": {"greedy": SCORES}, "paired": {}},
    "gap_closed": 0.6,
}


@dataclass
class FakeGeneration:
    text: str
    steps: list[Step]
    cost: Cost
    finish_reason: str


class FakeReasoner:
    """Answers every prompt with its own words in upper case."""

    pair = types.SimpleNamespace(slm=types.SimpleNamespace(facts={"engine": "none"}), served_slm=None)

    def __init__(self, seen):
        self.seen = seen

    def stream(self, prompt, **settings):
        self.seen.append((prompt, settings))
        return iter([f"{word} " for word in str(prompt).upper().split()])

    def generate(self, prompt, **settings):
        self.seen.append((prompt, settings))
        steps = [Step(0, 0, 5, 5), Step(0, 1, 7, 6, fired=True, finish_reason="stop")]
        return FakeGeneration(str(prompt).upper(), steps, Cost(generated=2), "stop")


@pytest.fixture
def fake(monkeypatch):
    """Put a module with one function in the place of a workflow; returns the list of its calls."""

    def install(module, function, answer):
        calls = []

        def run(*args, **kwargs):
            calls.append((args, kwargs))
            if isinstance(answer, BaseException):
                raise answer
            return answer(*args, **kwargs) if callable(answer) else answer

        replacement = types.ModuleType(module)
        setattr(replacement, function, run)
        monkeypatch.setitem(sys.modules, module, replacement)
        return calls

    return install


@pytest.fixture
def reasoner(fake):
    """A fake `s2t.api`; `.opened` and `.asked` keep what the command line passed."""
    asked = []
    return types.SimpleNamespace(opened=fake("s2t.api", "open_reasoner", FakeReasoner(asked)), asked=asked)


def error_line(capsys) -> str:
    """The one line on stderr; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("s2t: ")
    return lines[0]


# Help


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_is_printed_and_exits_0(words, capsys):
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom s2t.cli.main import COMMANDS, main\n"
        "for words in [[], *([name, '--help'] for name in COMMANDS)]: main(words)\n"
        f"sys.exit(' '.join(set({HEAVY!r}) & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_is_an_option_with_its_default(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("TERMINAL_WIDTH", "250")
    cli.main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for item in fields(CONFIGS[name]):
        if not item.init:  # no setting of this command
            assert f"--{item.name.replace('_', '-')} " not in shown
            continue
        assert f"--{item.name.replace('_', '-')} " in shown
        if item.default not in (None, MISSING) and not isinstance(item.default, bool):
            assert f"[default: {item.default}]" in shown
    for flag in ("--config", "--json", "--debug"):
        assert flag in shown


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_begins_with_the_ten_settings_that_people_use_and_shows_none_twice(name):
    command = typer.main.get_command(cli.build_app()).commands[name]
    options = [option for option in command.params if option.param_type_name == "option" and not option.hidden]
    flags = [flag for option in options for flag in (*option.opts, *option.secondary_opts)]
    assert len(flags) == len(set(flags))
    panels = [
        option.rich_help_panel for option in options if option.name not in ("all", "everything", "history", "trace")
    ]
    assert panels[: panels.count("Options")] == ["Options"] * panels.count("Options")
    assert panels.count("Options") <= 10
    assert panels == sorted(panels, key=panels.index)  # every panel in one piece


def test_every_command_has_a_config():
    assert set(CONFIGS) <= set(cli.COMMANDS)


def test_help_of_a_field_is_the_string_beneath_it_inherited_or_not():
    docs = field_docs(MeasureConfig)
    assert docs["quantile"].startswith("Steps above this quantile")
    assert docs["limit"] == "Number of problems."
    assert docs["llm"].startswith("Hub id")


# Mistakes


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["measure", "--no-such-option"], "--no-such-option"),
        (["measure", "stray"], "stray"),
        (["measure", "--limit", "many"], "--limit"),
        (["measure", "--limit"], "--limit"),
        (["measure", "--limit", "0"], "limit"),
        (["generate"], "prompt"),
        (["generate", " "], "prompt"),
        (["generate", "hello", "--strategy", "magic"], "magic"),
        (["generate", "hello", "--num-candidates", "0"], "num_candidates"),
        (["eval", "--strategies", "greedy,magic"], "magic"),
        (["measure", "--config", "/no/such/file.json"], "/no/such/file.json"),
        (["demo", "--limit", "0"], "limit"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(words, named, capsys):
    assert cli.main(words) == 2
    assert named.lower() in error_line(capsys).lower()


@pytest.mark.parametrize("text", ["{", "[]", '{"num_candidate": 3}', '{"limit": "many"}'])
def test_a_bad_config_file_is_one_line_and_exit_2(text, capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert cli.main(["measure", "--config", str(path)]) == 2
    error_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (DataError("no such run"), 2, "no such run"),
        (ModelError("two\nlines"), 2, "two lines"),
        (RuntimeError("boom\nat length"), 1, "RuntimeError: boom at length (run with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "runs/x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
        (OSError("odd"), 1, "OSError: odd"),
        (AssertionError(), 1, "AssertionError (run"),
    ],
)
def test_a_failure_is_one_line_with_its_exit_code(error, code, named, fake, capsys):
    fake("s2t.measure", "measure", error)
    assert cli.main(["measure"]) == code
    assert named in error_line(capsys)


@pytest.mark.parametrize("words", [["--debug", "measure"], ["measure", "--debug"], ["measure", "--debug", "--json"]])
def test_debug_anywhere_shows_the_traceback(words, fake, capsys):
    fake("s2t.measure", "measure", RuntimeError("boom"))
    assert cli.main(words) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("s2t: error: RuntimeError: boom")


def test_debug_after_two_dashes_is_a_prompt(reasoner, capsys):
    assert cli.main(["generate", "--", "--debug"]) == 0
    assert capsys.readouterr().out == "--DEBUG \n"


def test_a_reader_that_leaves_early_is_no_failure_to_talk_about():
    code = "from s2t.cli.main import main; import sys; sys.exit(main(['train', '--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == ""


# Calls


def test_flags_beat_the_file_and_only_given_flags_are_passed(fake, tmp_path):
    calls = fake("s2t.measure", "measure", MEASURED)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"limit": 7, "seed": 5, "trust_remote_code": True}))
    words = ["measure", "--config", str(path), "--limit", "9", "--no-trust-remote-code", "--json"]
    assert cli.main(words) == 0
    assert calls[0][0] == (MeasureConfig(limit=9, seed=5, trust_remote_code=False),)


@pytest.mark.parametrize(
    ("words", "module", "function", "answer", "shown"),
    [
        (["measure"], "s2t.measure", "measure", MEASURED, "96.0"),
        (["calibrate"], "s2t.measure", "calibrate", {"thresholds": {"divergence": 1.5}}, "divergence"),
        (["collect"], "s2t.collect", "collect", {"num_groups": 1234, "shards": ["a", "b"]}, "1,234"),
        (["train"], "s2t.train.trainer", "train", {"num_steps": 12, "adapter": "x/adapter"}, "x/adapter"),
        (["merge"], "s2t.merge", "merge", MERGED, "x/merged"),
        (["eval"], "s2t.evaluate", "evaluate", SUMMARY, "--all"),
        (["eval", "--all"], "s2t.evaluate", "evaluate", SUMMARY, "least"),
        (["report"], "s2t.report", "write_report", "x/report.html", "x/report.html"),
        (["demo"], "s2t.demo", "demo", SUMMARY, "75.0"),
    ],
)
def test_a_command_prints_a_table_or_exactly_one_json_document(words, module, function, answer, shown, fake, capsys):
    fake(module, function, answer)
    assert cli.main(words) == 0
    assert shown in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == (answer if isinstance(answer, dict) else {"report": answer})


def test_what_a_library_prints_does_not_spoil_the_json(fake, capsys):
    def chatty(config):
        print("loading...")
        return MEASURED

    fake("s2t.measure", "measure", chatty)
    assert cli.main(["measure", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == MEASURED
    assert captured.err == "loading...\n"


def test_json_is_strict():
    text = json_text({"nan": float("nan"), "cost": Cost(generated=1), "more": (1, float("inf"))})
    assert json.loads(text)["nan"] is None
    assert json.loads(text)["cost"]["generated"] == 1
    assert json.loads(text)["more"] == [1, None]


def test_demo_passes_its_settings_on(fake):
    calls = fake("s2t.demo", "demo", SUMMARY)
    assert cli.main(["demo", "--out", "x", "--limit", "5", "--train-problems", "7", "--json"]) == 0
    assert calls == [((), {"out": "x", "seed": 0, "limit": 5, "groups": 7})]


# Generate and chat


def test_generate_streams_the_text(reasoner, capsys):
    assert cli.main(["generate", "one two", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == "ONE TWO \n"
    prompt, settings = reasoner.asked[0]
    assert prompt == "one two"
    assert (settings["strategy"], settings["config"].max_new_tokens, settings["seed"]) == (None, 9, 0)


def test_generate_reads_the_prompt_from_stdin(reasoner, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert cli.main(["generate", "-"]) == 0
    assert capsys.readouterr().out == "FROM A PIPE \n"


def test_generate_json_is_one_document(reasoner, capsys):
    assert cli.main(["generate", "hello", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["text"] == "HELLO"
    assert (document["num_steps"], document["num_triggered"], document["num_flips"]) == (2, 1, 1)


def test_generate_writes_a_trace_line_per_step(reasoner, capsys, tmp_path):
    pytest.importorskip("s2t.files")
    path = tmp_path / "trace.jsonl"
    assert cli.main(["generate", "hello", "--trace", str(path)]) == 0
    assert capsys.readouterr().out == "HELLO\n"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["token_id"], line["flip"]) for line in lines] == [(5, False), (7, True)]


@pytest.mark.parametrize(
    ("flags", "strategies", "with_llm"),
    [
        (["--strategy", "s2t-local", "--adapter", "x"], ["s2t-local"], None),
        (["--strategy", "greedy"], ["greedy"], None),
        (["--strategy", "s2t"], ["s2t"], None),
        (["--strategy", "s2t-local", "--adapter", "x", "--trigger", "divergence"], ["s2t-local"], True),
        (["--adapter", "x"], None, False),
    ],
)
def test_the_models_of_the_strategy_are_opened_and_the_llm_only_where_it_is_read(flags, strategies, with_llm, reasoner):
    assert cli.main(["generate", "hello", "--llm", "tiny:llm", *flags]) == 0
    [((config, *asked), _)] = reasoner.opened
    assert config.llm == "tiny:llm"
    assert asked == [strategies, with_llm]


def test_chat_asks_each_question_afresh_until_exit(reasoner, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n/exit\nthree\n"))
    assert cli.main(["chat"]) == 0
    assert capsys.readouterr().out == "ONE \nTWO \n"
    assert [prompt for prompt, _ in reasoner.asked] == ["one", "two"]


def test_chat_with_history_repeats_earlier_turns(reasoner, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert cli.main(["chat", "--history"]) == 0
    first, second = [prompt for prompt, _ in reasoner.asked]
    assert first == "one"
    assert [(turn["role"], turn["content"]) for turn in second] == [
        ("user", "one"),
        ("assistant", "ONE"),
        ("user", "two"),
    ]


def test_system_and_stop_reach_the_reasoner(reasoner):
    assert cli.main(["generate", "hello", "--system", "Be brief.", "--stop", ".", "--stop", "\n\n"]) == 0
    assert cli.main(["generate", "hello"]) == 0
    given, plain = [settings for _, settings in reasoner.asked]
    assert (given["config"].system, given["config"].stop) == ("Be brief.", [".", "\n\n"])
    assert (plain["config"].system, plain["config"].stop) == (None, [])


def test_chat_json_is_one_document_at_the_end(reasoner, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo"))
    assert cli.main(["chat", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == [{"question": "one", "text": "ONE "}, {"question": "two", "text": "TWO "}]
