"""What an evaluation prints: one table of at most 80 columns, nothing in it folded, and a line that says where the rest is."""

from __future__ import annotations

import copy
import json

import pytest

from s2t.cli.evaluate import print_brief
from s2t.cli.main import main
from s2t.cli.output import short

TEMPLATES = ("seen_templates", "unseen_templates")


def scores(accuracy, slm=1_234_567, llm=0, **more):
    counts = {"slm_forwards": slm, "llm_forwards": llm, "slm_tokens": 123_456, "llm_tokens": 123_456 if llm else 0}
    return {"accuracy": accuracy, "ci95": [max(accuracy - 0.05, 0), 1.0], "num_problems": 900} | counts | more


def against(difference, p):
    return {"difference": difference, "ci95": [0.0, 0.2], "p_value": p, "p_holm": p, "wins": 3, "losses": 1}


LONG = ("s2t-local@criticality", "takeover@criticality", "s2t-local@divergence", "self-consistency", "self-certainty")
PART = {
    "strategies": {"greedy": scores(0.5)} | {name: scores(0.995, 23_456, 1_999_999) for name in LONG},
    "paired": {f"{name} vs greedy": against(0.495, 0.0001) for name in LONG},
}
SUMMARY = {
    "task": "rg:gsm_symbolic,max_number=100",
    "split": "test",
    "seed": 0,
    "num_test": 1000,
    **PART,
    "gap_closed": 0.4,
    "seen_templates": {"num_templates": 60, "num_problems": 800, **PART},
    "unseen_templates": {"num_templates": 20, "num_problems": 200, **PART},
}


@pytest.fixture
def printed(capsys, monkeypatch):
    def brief(summary, rest="All tables: --all"):
        print_brief(summary, rest)
        return capsys.readouterr().out.splitlines()

    monkeypatch.setenv("COLUMNS", "80")
    return brief


@pytest.mark.parametrize("seconds", [0.0, 99.9, 12_345.6, 9_999_999.0])
def test_it_fits_80_columns_and_no_cell_is_folded(seconds, printed):
    summary = copy.deepcopy(SUMMARY)
    for found in summary["strategies"].values():
        found["seconds"] = seconds
    lines = printed(summary)
    assert max(map(len, lines)) <= 80
    for name in ("greedy", *LONG):
        rows = [line.split() for line in lines if line.split()[:1] == [name]]
        assert len(rows) == 3, "all problems, seen and unseen templates"
        assert all(len(row) == 9 for row in rows)
    assert sum("─" in line for line in lines) == 1, "one table"


def test_templates_are_there_only_where_they_exist(printed):
    lines = printed({key: value for key, value in SUMMARY.items() if key not in TEMPLATES})
    assert not any("templates" in line for line in lines)
    assert sum(line.strip().startswith("greedy") for line in lines) == 1
    assert [line.strip() for line in printed(SUMMARY) if "templates" in line] == ["seen templates", "unseen templates"]


@pytest.mark.parametrize(
    ("difference", "p", "shown"),
    [(0.123, 0.01, "+12.3*"), (-0.02, 0.8, "-2.0"), (0.0, 1.0, "0.0"), (-0.0001, 0.9, "0.0"), (0.05, None, "+5.0")],
)
def test_a_star_says_that_a_difference_holds(difference, p, shown, printed):
    summary = {
        "strategies": {"greedy": scores(0.5), "s2t": scores(0.6)},
        "paired": {"s2t vs greedy": against(difference, p)},
    }
    lines = printed(summary)
    [row] = [line.split() for line in lines if line.strip().startswith("s2t")]
    assert row[5] == shown
    assert lines[-1].startswith("* p < 0.05 (Holm). ") == shown.endswith("*")
    assert lines[-1].endswith("All tables: --all")


def test_without_greedy_there_is_no_column_against_it(printed):
    lines = printed({"strategies": {"llm": scores(0.6, slm=0, llm=500)}})
    assert not any("greedy" in line for line in lines)
    [row] = [line.split() for line in lines if line.strip().startswith("llm")]
    assert row[-2] == "0+500", "forwards of the LLM are told from those of the SLM"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (None, "–"),
        (0, "0"),
        (999, "999"),
        (1000, "1.0k"),
        (9949, "9.9k"),
        (9960, "10k"),
        (999_499, "999k"),
        (999_600, "1.0M"),
        (2.5e9, "2.5G"),
    ],
)
def test_counts_are_short(count, shown):
    assert short(count) == shown


@pytest.mark.parametrize("command", ["eval", "demo"])
def test_all_prints_every_table_and_json_the_summary(command, monkeypatch, capsys):
    module, name = {"eval": ("s2t.evaluate", "evaluate"), "demo": ("s2t.demo", "demo")}[command]
    monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: SUMMARY)
    monkeypatch.setenv("COLUMNS", "160")
    assert main([command, "--out", "runs/x"]) == 0
    brief = capsys.readouterr().out
    assert main([command, "--out", "runs/x", "--all"]) == 0
    everything = capsys.readouterr().out
    assert sum("─" in line for line in brief.splitlines()) == 1
    assert "runs/x" in brief.splitlines()[-1] and "--all" in brief.splitlines()[-1]
    for table in ("Cost, prompts included", "Differences on the same problems", "never seen in training", "gap closed"):
        assert table in everything and table not in brief
    assert main([command, "--out", "runs/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(SUMMARY))


def test_measure_ends_with_what_to_do_next_and_says_when_it_was_a_first_look(tmp_path, capsys):
    out = tmp_path / "measure"
    assert main(["measure", "--limit", "4", "--max-new-tokens", "24", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 problems are a first look" in printed
    assert printed.splitlines()[-1] == f"Next: s2t calibrate --run {out}"
