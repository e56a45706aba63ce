"""`s2t reproduce`: recipes are checked as a whole, run stage by stage and resumed, their numbers beside the published ones."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from s2t.cli.main import main
from s2t.config import ReproduceConfig
from s2t.errors import ConfigError
from s2t.model.adapter import read_adapter_config
from s2t.reproduce import read_recipe, reproduce

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
EMBEDDED = ["slm=tiny:slm", "llm=tiny:llm", "task=rg:gsm_symbolic", "dtype=float32", "limit=12", "max_new_tokens=48"]
SHORT = """
title = "short"
[settings]
slm = "tiny:slm"
max_new_tokens = 48
limit = 6
[[stage]]
name = "points"
command = "measure"
llm = "tiny:llm"
[[stage]]
name = "thresholds"
command = "calibrate"
run = "@points"
[[stage]]
name = "scores"
command = "eval"
strategies = "greedy,s2t"
llm = "tiny:llm"
calibration = "@thresholds/calibration.json"
published = { greedy = 40.0 }
"""
TWO_TASKS = """
title = "two tasks"
[settings]
slm = "tiny:slm"
max_new_tokens = 48
limit = 6
[[stage]]
name = "collect-gsm"
command = "collect"
llm = "tiny:llm"
threshold = 0.05
task = "rg:gsm_symbolic,max_number=100"
[[stage]]
name = "collect-sums"
command = "collect"
llm = "tiny:llm"
threshold = 0.05
task = "rg:chain_sum"
[[stage]]
name = "train"
command = "train"
groups = "@collect-gsm,@collect-sums"
epochs = 0.1
"""


def written(tmp_path, text=SHORT):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_to_its_last_stage(path, tmp_path):
    title, stages = read_recipe(str(path), str(tmp_path))
    assert "Qwen2.5" in title
    assert [stage.published for stage in stages if stage.command == "eval"] or "sufficiency" in path.stem
    loading = [
        s.name
        for s in stages
        if s.command == "eval" and "s2t-local" in s.settings["strategies"] and "llm" in s.settings
    ]
    assert not loading  # s2t-local is scored where no LLM is loaded


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_on_the_embedded_pair(path, tmp_path):
    trains = any(stage.command == "train" for stage in read_recipe(str(path), "x")[1])
    override = [*EMBEDDED, *(["learning_rate=5e-3"] if trains else [])]
    found = reproduce(ReproduceConfig(recipe=str(path), out=str(tmp_path / "out"), override=override))
    measured = {(row[0], row[1]) for row in found["rows"]}
    published = {(s.name, what) for s in read_recipe(str(path), "x")[1] for what in s.published}
    assert published <= measured


def test_a_recipe_runs_resumes_and_shows_both_numbers(tmp_path):
    config = ReproduceConfig(recipe=written(tmp_path), out=str(tmp_path / "out"))
    found = reproduce(config)
    assert [row[:3] for row in found["rows"]] == [("scores", "greedy", 6), ("scores", "s2t", 6)]
    assert [row[-1] for row in found["rows"]] == [40.0, None]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "complete"
    assert "| scores | greedy | 6 |" in (tmp_path / "out" / "table.md").read_text()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-00000.*")}
    assert reproduce(config)["rows"] == found["rows"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*-00000.*")} == shards


def test_a_recipe_trains_on_groups_of_several_tasks(tmp_path):
    reproduce(ReproduceConfig(recipe=written(tmp_path, TWO_TASKS), out=str(tmp_path / "out")))
    adapter = read_adapter_config(tmp_path / "out" / "train" / "adapter")
    assert adapter.task == "rg:gsm_symbolic,max_number=100;rg:chain_sum"
    assert adapter.heldout_of("rg:gsm_symbolic,max_number=100") == adapter.heldout_templates != ()
    assert adapter.heldout_of("rg:chain_sum") == ()


def test_the_printed_commands_are_commands(tmp_path, capsys):
    assert main(["reproduce", written(tmp_path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[:2] for line in lines] == [["s2t", "measure"], ["s2t", "calibrate"], ["s2t", "eval"]]
    assert shlex.split(lines[1])[3] == str(tmp_path / "out" / "points")
    assert not (tmp_path / "out").exists()
    assert main(shlex.split(lines[0])[1:]) == 0
    assert (tmp_path / "out" / "points" / "measure.json").is_file()


def test_variables_of_chat_templates_are_a_table_of_the_recipe(tmp_path, capsys):
    recipe = SHORT.replace(
        "[settings]", '[settings]\nchat_template_kwargs = { enable_thinking = false, mood = "calm" }'
    )
    assert main(["reproduce", written(tmp_path, recipe), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    measure, calibrate, evaluate = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    for words in (measure, evaluate):
        given = json.loads(words[words.index("--chat-template-kwargs") + 1])
        assert given == {"enable_thinking": False, "mood": "calm"}
    assert "--chat-template-kwargs" not in calibrate
    with pytest.raises(ConfigError, match="cannot set tools"):
        read_recipe(written(tmp_path, recipe.replace("mood", "tools")), "x")


def test_an_override_reaches_the_stages_that_give_the_setting(tmp_path):
    path = written(tmp_path, SHORT.replace('llm = "tiny:llm"\ncalibration', "calibration"))
    _, stages = read_recipe(path, "x", ["llm=other", "workers=2", "limit=3"])
    assert [stage.settings.get("llm") for stage in stages] == ["other", None, None]
    assert [stage.settings.get("workers") for stage in stages] == [2, None, 2]
    assert [stage.settings.get("limit") for stage in stages] == [3, None, 3]
    _, stages = read_recipe(
        path, "x", ["task=rg:gsm_symbolic,max_number=100", "revision=0123456", "strategies=greedy,sample"]
    )
    assert stages[0].settings["task"] == "rg:gsm_symbolic,max_number=100"
    assert stages[-1].settings["strategies"] == "greedy,sample"
    assert stages[0].settings["revision"] == "0123456"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SHORT.replace("[settings]", "[settings"), "is not TOML"),
        ("title = 'x'", r"needs \[\[stage\]\] tables"),
        (SHORT.replace('"@points"', '"@point"'), "stage thresholds: @point is no earlier stage; there are points"),
        (SHORT.replace('"scores"', '"points"'), "two stages named points"),
        (SHORT.replace('"eval"', '"evaluate"'), "stage scores: command must be one of"),
        (SHORT.replace("greedy,s2t", "greedy,s3t"), "stage scores: strategies must be one of"),
        (SHORT.replace("strategies =", "strategy ="), "stage scores: unknown setting strategy"),
        (SHORT.replace("limit = 6", "limt = 6"), "no stage has a setting limt"),
        (SHORT.replace("limit = 6", 'limit = "six"'), "stage points: limit must be a whole number"),
        (SHORT.replace("strategies =", 'split = "tset"\nstrategies ='), "stage scores: split must be one of"),
        (
            SHORT.replace("greedy = 40.0", 'greedy = "72.1"'),
            "published must be a table of numbers",
        ),
        ("settings = 3", "needs .settings. to be a table"),
        ("stage = 3", r"needs \[\[stage\]\] tables"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        reproduce(ReproduceConfig(recipe=written(tmp_path, text), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["reproduce", str(tmp_path / "none.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["reproduce"]) == 2
    assert "needs a recipe" in capsys.readouterr().err


def test_an_override_does_not_replace_what_an_earlier_stage_wrote(tmp_path):
    recipe = Path(__file__).parents[1] / "recipes" / "qwen2.5-coder.toml"
    _, stages = read_recipe(str(recipe), str(tmp_path), ["slm=tiny:slm", "limit=4"])
    slm = {stage.name: stage.settings.get("slm") for stage in stages}
    assert slm["gsm8k"] == slm["train"] == "tiny:slm"
    assert slm["gsm8k-sft"] == slm["svamp-sft"] == slm["collect-on-sft"] == str(tmp_path / "sft" / "adapter")
    assert slm["gsm8k-kd"] == str(tmp_path / "kd" / "adapter")
