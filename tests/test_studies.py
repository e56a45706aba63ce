"""Studies on the embedded pair, small: every one runs, says what its runs say, and goes on where it was killed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from s2t import demo
from s2t.config import (
    CalibrateConfig,
    CollectConfig,
    MeasureConfig,
    ModelConfig,
    StudyConfig,
    TrainConfig,
    parse_settings,
)
from s2t.errors import ConfigError
from s2t.files import RunFolder, read_json, write_json
from s2t.report.chart import draw_charts
from s2t.studies import STUDIES, adapters, baselines, critical, rivals, slips, study, triggers
from s2t.studies.knowledge import equations, fault, knowledge
from s2t.studies.lab import Lab
from s2t.studies.run import cell
from s2t.workflows import WORKFLOWS

SMALL = {
    "slm": "tiny:slm",
    "llm": "tiny:llm",
    "limit": 8,
    "calibration_limit": 24,
    "train_limit": 32,
    "max_new_tokens": 96,
    "num_seeds": 1,
    "training": "learning_rate=5e-3,batch_groups=8,epochs=2,criticality_threshold=0.5",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Base runs that all studies here share, made by the first of them."""
    return str(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where studies go on from each other's tests."""
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module", autouse=True)
def shorter():
    """Fewer arms of each kind; the whole set is what the command runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "NUM_SAMPLES", 2)
        patch.setattr(triggers, "RATES", (0.01, 0.1))
        patch.setattr(triggers, "KS", (1, 8))
        patch.setattr(rivals, "SHARES", (0.05, 0.2))
        patch.setattr(rivals, "NUM_SAMPLES", 2)
        patch.setattr(critical, "NUM_ROLLOUTS", 2)
        patch.setattr(adapters, "ARMS", {name: adapters.ARMS[name] for name in ("default", "bins, scope always")})
        patch.setattr(adapters, "_SHARES", (0.5, 1.0))
        yield


def run(name, base, folder, **settings):
    config = StudyConfig(name=name, base=base, out=str(folder / name), **SMALL | settings)
    return study(config), Path(config.out)


SLOW = ("baselines", "critical", "distillation", "rivals", "scaling", "size", "triggers")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STUDIES]
)
def test_every_study_ends_with_a_table_and_a_picture(name, base, folder):
    settings = {"slms": "tiny:slm,tiny:slm-small"} if name == "sufficiency" else {}
    found, made = run(name, base, folder, **settings)
    assert found["rows"]
    assert all(len(row) == len(found["columns"]) for row in found["rows"])
    assert (made / "picture.png").read_bytes().startswith(b"\x89PNG")
    table = (made / "table.md").read_text()
    assert found["title"] in table
    assert len([line for line in table.splitlines() if line.startswith("|")]) == len(found["rows"]) + 2
    assert json.loads((made / "study.json").read_text())["name"] == name
    again, _ = run(name, base, folder, **settings)
    assert json.dumps(again) == json.dumps(found)


@pytest.mark.slow
def test_distilled_models_are_compared_with_selection(base, folder):
    found, made = run("distillation", base, folder)
    arms = {row[0]: row for row in found["rows"]}
    assert set(arms) == {
        "greedy, the SLM as it is",
        "s2t-local",
        "sft",
        "kd",
        "on-policy-kd",
        "s2t-local on top of sft",
    }
    steps = read_json(Path(base) / "train" / "train.json")["num_steps"]
    assert {arms[name][2] for name in ("s2t-local", "sft", "kd", "on-policy-kd")} == {steps}
    config = read_json(made / "sft" / "manifest.json")["config"]
    assert (config["max_steps"], config["learning_rate"], config["limit"]) == (steps, 5e-3, SMALL["train_limit"])
    compared, _ = run("knowledge", base, folder / "distilled", distilled=str(made / "sft" / "adapter"))
    rows = {row[0]: row for row in compared["rows"]}
    assert set(rows) == {"greedy", "s2t-local", "s2t", "llm", "sft"}
    assert rows["greedy"][6:] == (0.0, 0.0, 0.0) or rows["greedy"][6:] == [0.0, 0.0, 0.0]
    assert any(note.startswith("s2t-local and sft: of ") for note in compared["notes"])


def test_distilled_models_of_one_method_have_rows_of_their_own(tmp_path, monkeypatch):
    slms = []
    for folder, method in (("one", "kd"), ("two", "kd"), ("three", "sft")):
        slms.append(str(tmp_path / folder))
        write_json(tmp_path / folder / "s2t_distill.json", {"method": method})
    lab = Lab(StudyConfig(name="knowledge", distilled=",".join(slms), out=str(tmp_path / "study")))
    evaluated = {}

    def evaluate(name, strategies, **settings):
        assert name not in evaluated
        evaluated[name] = settings.get("slm")
        for place, strategy in enumerate(strategies.split(",")):
            answer = {"problem_id": "p", "strategy": strategy, "text": "3 + 4 = 7", "is_correct": place == 0}
            with (tmp_path / "study" / name / "results.jsonl").open("a") as file:
                file.write(json.dumps(answer) + "\n")

    for name in ("eval", "eval-kd-1", "eval-kd-2", "eval-sft"):
        (tmp_path / "study" / name).mkdir(parents=True)
    monkeypatch.setattr(
        Lab, "evaluated", lambda _, name, strategies, **settings: evaluate(name, strategies, **settings)
    )
    monkeypatch.setattr(Lab, "trained", lambda _: "adapter")
    monkeypatch.setattr(Lab, "calibrated", lambda _: "calibration")
    found = knowledge(lab)
    assert [row[0] for row in found.rows] == ["greedy", "s2t-local", "s2t", "llm", "kd-1", "kd-2", "sft"]
    assert evaluated == {"eval": None, "eval-kd-1": slms[0], "eval-kd-2": slms[1], "eval-sft": slms[2]}
    assert f"kd-2 is {slms[1]}." in found.notes


def test_the_splits_of_a_run_are_told_apart(base, folder):
    found, _ = run("data", base, folder)
    rows = {row[0]: row for row in found["rows"]}
    assert [rows[name][2] for name in ("training", "calibration", "test")] == [32, 24, 8]
    assert rows["training"][4] == 0 < rows["calibration"][3]
    assert len({row[-1] for row in rows.values()}) == 3
    collected = read_json(Path(base) / "collect" / "collect.json")
    assert rows["training"][6] == collected["num_groups"]


def test_a_pair_without_divergence_points_has_an_empty_picture_and_says_so(base, tmp_path):
    found, made = run("sufficiency", base, tmp_path, llm="tiny:slm")
    assert [row[3] for row in found["rows"]] == [0]
    assert found["chart"]["series"] == []
    assert "no divergence point" in found["notes"][-1]
    assert (made / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_threshold_of_0_is_said_and_not_drawn(base, tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "thresholds", lambda lab: {"divergence": 0.0})
    found, made = run("data", base, tmp_path)
    assert [one["name"] for one in found["chart"]["series"]] == ["training", "calibration", "test"]
    assert "threshold is 0 nats" in found["notes"][-1]
    assert (made / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_at_0_is_off_a_logarithmic_axis():
    series = [{"name": "a", "x": [0.0, 1.0], "y": [0.1, 0.2], "ci95": []}]
    chart = {"x_label": "x", "y_label": "y", "series": series, "kind": "line", "log_x": True}
    assert draw_charts([chart]).startswith(b"\x89PNG")


def test_no_study_changes_the_shared_runs(base, folder, tmp_path):
    run("candidates", base, folder)
    files = {path: path.stat().st_mtime_ns for path in Path(base).rglob("*") if path.is_file()}
    run("positions", base, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in Path(base).rglob("*") if path.is_file()} == files


def test_one_candidate_is_greedy(base, folder):
    found, made = run("candidates", base, folder)
    at = {(row[0], row[1]): row[2] for row in found["rows"]}
    greedy = read_json(made / "k-1" / "summary.json")["strategies"]
    assert at["s2t", 1] == at["s2t-local", 1] == greedy["s2t"]["accuracy"]
    assert all(row[4] == 0 for row in found["rows"] if row[1] == 1)


@pytest.mark.parametrize("name", ["entropy", "step-score"])
def test_a_threshold_fires_nearest_to_the_share_and_never_between_ties(name):
    readings = [0.0, 1.0, 1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]

    def rate(share):
        cut = rivals.threshold_for(name, readings, share)
        return sum(r < cut if name == "step-score" else r > cut for r in readings) / len(readings)

    wanted = {0.0: 0.0, 0.1: 0.1, 0.18: 0.1 if name == "step-score" else 0.2, 0.5: 0.5, 0.97: 1.0}
    assert {share: rate(share) for share in wanted} == pytest.approx(wanted)


def test_a_method_runs_once_where_several_shares_have_one_threshold(tmp_path, monkeypatch):
    ran = []

    def run_of(lab, folder, names, share, **settings):
        ran.extend((folder, name) for name in names)
        return [rivals.Arm(name, share, [[]], 0.0) for name in names]

    readings = {"step-score": [1.0] * 50 + [9.0] * 50, "divergence": [i / 100 for i in range(100)]}
    monkeypatch.setattr(rivals, "_of", run_of)
    monkeypatch.setattr(rivals, "_readings", lambda *_: readings)
    monkeypatch.setattr(rivals, "findings", lambda lab, arms, shares: arms)
    methods, shares = "specreason,s2t@divergence", (0.02, 0.1, 0.5)
    config = StudyConfig(name="rivals", methods=methods, shares="0.02,0.1,0.5", out=str(tmp_path))
    arms = rivals.rivals(Lab(config))
    assert [arm.share for arm in arms if arm.method == "specreason"] == [*shares]
    assert [folder for folder, name in ran if name == "specreason"] == ["share-0.02", "share-0.5"]
    assert [folder for folder, name in ran if name == "s2t@divergence"] == [f"share-{share:g}" for share in shares]


@pytest.mark.slow
def test_some_critical_tokens_are_known_slips_and_an_oracle_gains_there(tmp_path, monkeypatch):
    monkeypatch.setattr(critical, "NUM_ROLLOUTS", 16)
    found, made = run("critical", None, tmp_path, limit=10, max_new_tokens=160)
    rows = {row[0]: row for row in found["rows"]}
    places = read_json(made / "found.json")
    assert 0 < len(places) <= 10 * (1 - rows["greedy"][3]) + 1e-9
    assert sum(one["is_slip"] for one in places.values()) >= 2
    assert 0 < rows["takeover@critical"][1] < 0.05
    assert rows["takeover@critical"][3] > rows["greedy"][3]


def test_a_base_of_another_pair_is_refused(base, folder, tmp_path):
    run("candidates", base, folder)
    with pytest.raises(ConfigError, match=r"has slm tiny:slm, not tiny:slm-small"):
        run("candidates", base, tmp_path / "other", slm="tiny:slm-small")


def write_demo(folder, **changes):
    """The manifests that `s2t demo` leaves; `changes` by name of a run."""
    common = {"slm": demo.SLM, "llm": demo.LLM, "task": demo.TASK, "seed": 0, "workers": 2}
    calibration = str(folder / "calibrate" / "calibration.json")
    configs = {
        "measure": MeasureConfig(**common, limit=demo.NUM_CALIBRATION, quantile=demo.QUANTILE),
        "calibrate": CalibrateConfig(run=str(folder / "measure"), quantile=demo.QUANTILE),
        "collect": CollectConfig(**common, limit=demo.NUM_TRAIN, calibration=calibration, policy=demo.POLICY),
        "train": TrainConfig(slm=demo.SLM, groups=str(folder / "collect"), seed=0, **demo.TRAIN_SETTINGS),
    }
    for name, config in configs.items():
        RunFolder.open(folder / name, name, replace(config, **changes.get(name, {}))).finish()


def open_base(base, folder, **settings):
    """Every run of the base that a study takes."""
    lab = Lab(StudyConfig(base=str(base), out=str(folder), **settings))
    return [lab.measured(), lab.calibrated(), lab.collected(), lab.trained()]


def test_the_runs_of_the_demo_serve_every_study_with_default_settings(tmp_path):
    write_demo(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "demo")  # wherever it is by now
    found = open_base(tmp_path / "demo", tmp_path / "study", batch_size=8, device="cpu")
    names = ("measure", "calibrate", "collect", "train/adapter")
    assert found == [tmp_path / "demo" / name for name in names]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llm": "tiny:llm-other"}, "has llm tiny:llm, not tiny:llm-other, in its measure; pass --llm tiny:llm"),
        ({"seed": 1}, "has seed 0, not 1, in its measure; pass --seed 0, another --base or none"),
        ({"calibration_limit": 9}, "has limit 1000, not 9, in its measure; pass --calibration-limit 1000"),
        ({"train_limit": 9}, "has limit 6000, not 9, in its collect; pass --train-limit 6000"),
        ({"quantile": 0.5}, "has quantile 0.97, not 0.5, in its measure; pass --quantile 0.97"),
        ({"max_new_tokens": 9}, "has max_new_tokens 256, not 9, in its measure"),
        ({"training": "epochs=6"}, "has lora_dropout 0.1, not 0.05, in its train; pass --training lora_dropout=0.1"),
    ],
)
def test_a_base_with_another_setting_is_refused(settings, message, tmp_path):
    write_demo(tmp_path / "demo")
    with pytest.raises(ConfigError, match=message):
        open_base(tmp_path / "demo", tmp_path / "study", **settings)


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ("train", {"epochs": 1.0}, r"has epochs 1\.0, not 6\.0, in its train; pass --training epochs=1\.0"),
        ("train", {"seed": 4}, "has seed 4, not 0, in its train; pass --seed 4"),
        ("train", {"num_bins": 2}, "has num_bins 2, not 16, in its train"),
        ("train", {"groups": "runs/other"}, "has groups runs/other, not .*/collect, in its train; pass another --base"),
        ("collect", {"policy": "greedy"}, "has policy greedy, not s2t, in its collect; pass another --base or none"),
    ],
)
def test_every_run_of_a_base_is_compared(run, changes, message, tmp_path):
    write_demo(tmp_path / "demo", **{run: changes})
    with pytest.raises(ConfigError, match=message):
        open_base(tmp_path / "demo", tmp_path / "study")


def test_a_base_that_has_an_adapter_alone_is_enough_for_it(tmp_path):
    write_demo(tmp_path / "demo")
    for name in ("measure", "calibrate", "collect"):
        shutil.rmtree(tmp_path / "demo" / name)
    lab = Lab(StudyConfig(base=str(tmp_path / "demo"), out=str(tmp_path / "study")))
    assert lab.trained() == tmp_path / "demo" / "train" / "adapter"


def test_the_pair_is_loaded_as_every_command_loads_it(monkeypatch, tmp_path):
    config = StudyConfig(slm="a/b", revision="v1", llm_revision="v2", device_map="auto", out=str(tmp_path))
    assert set(Lab(config).models) == set(ModelConfig.__dataclass_fields__)
    assert all(value == getattr(config, name) for name, value in Lab(config).models.items())
    passed = []
    monkeypatch.setitem(WORKFLOWS, "measure", lambda **settings: passed.append(settings))
    Lab(config).measured("own")
    Lab(config).measured("other", slm="c/d")
    assert [settings["revision"] for settings in passed] == ["v1", None]  # v1 is a revision of a/b
    assert [config.for_slm(slm).revision for slm in ("a/b", "c/d")] == ["v1", None]


def test_an_unknown_study_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="study must be one of baselines"):
        study(StudyConfig(name="weather", out=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("3 + 4 = 7", [True]),
        ("so 3+4=8. Then 2 * 5 = 10", [False, True]),
        ("2 + 3 * 4 = 14 and 2 + 3 * 4 = 20", [True, False]),
        ("1,200 / 4 = 300", [True]),
        ("10 - 4 - 3 = 3", [True]),
        ("0.5 * 3 = $1.5", [True]),
        ("5 / 0 = 0", []),
        ("x = 4, total 7", []),
        ("a rate of 10/50 = 1/5", []),
        ("84 pages x 3/4 = 63 pages", []),
        ("42 / 12 = 4 trays", []),
        ("42 / 12 = 3.5", [True]),
        ("-3 + 5 = 2", [True]),
    ],
)
def test_equations_of_a_text(text, holds):
    assert equations(text) == holds


@pytest.mark.parametrize(
    ("text", "wanted", "may_stand"),
    [
        ("4", "42", True),
        ("3", "42", False),
        ("42", "42", True),
        ("42.", "42", True),
        ("4.", "42", False),
        ("421", "42", False),
        (".", "", True),
        ("1", "", False),
        ("3.5", "3.5", True),
        (" dollars", "4", False),
        ("-", "-8", True),
    ],
)
def test_what_may_stand_in_a_result(text, wanted, may_stand):
    assert slips.fits(text, wanted) is may_stand


def traced(*tokens):
    """Steps of a traced answer: a token, or (written, what the SLM would have written) where it fired."""
    steps = []
    for token in tokens:
        own, greedy = token if isinstance(token, tuple) else (token, token)
        steps.append({"text": own} | ({"greedy_text": greedy, "flip": True} if own != greedy else {}))
        steps[-1] |= {"fired": True} if isinstance(token, tuple) else {}
    return steps


def judged(steps):
    return [(i, c.greedy_is_right, c.is_right) for i, c in enumerate(slips.choices_of(steps)) if c.is_result]


def test_a_slip_that_selection_mends_is_seen_and_so_is_one_that_stays():
    mended = traced("2", "5", " +", " ", "1", "7", " =", " ", ("4", "3"), "2", ".")
    assert judged(mended) == [(8, False, True), (9, True, True), (10, True, True)]
    assert judged(traced("2", "5", " +", " ", "1", "7", " =", " ", "3", "2", ".")) == [(8, False, False)]
    spoiled = traced("2", "5", " +", " ", "1", "7", " =", " ", ("3", "4"), "2", ".")
    assert judged(spoiled) == [(8, True, False)]


def test_tokens_of_several_characters_are_judged_from_where_the_result_begins():
    steps = traced("25", " + ", "17", " =", (" 42", " 32"), ".")
    assert judged(steps) == [(4, False, True), (5, True, True)]
    assert judged(traced("1.5", " + ", "2", " = ", "3", ".5", "!")) == [
        (4, True, True),
        (5, True, True),
        (6, True, True),
    ]
    assert judged(traced("1", " / ", "3", " = ", "0", ".3")) == []


def test_faults_are_slips_or_others():
    assert fault({"is_correct": True, "text": "3 + 4 = 8"}) == "none"
    assert fault({"is_correct": False, "text": "3 + 4 = 8"}) == "slip"
    assert fault({"is_correct": False, "text": "3 + 4 = 7"}) == "other"


def test_training_settings_as_text():
    assert parse_settings("epochs=2, learning_rate=5e-3,criticality=head") == {
        "epochs": 2,
        "learning_rate": 5e-3,
        "criticality": "head",
    }
    with pytest.raises(ConfigError, match="name=value"):
        parse_settings("fast")


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("epoch=2", "training: unknown setting epoch; known: "),
        ("epochs=two", "training: epochs must be a number; got 'two'"),
        ("learning_rate=0", "training: learning_rate must be above 0"),
        ("fast", "training must be name=value"),
        ("epochs=2,out=runs/mine", "training takes no out, which the study gives"),
    ],
)
def test_a_mistake_in_training_is_said_before_anything_runs(training, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        StudyConfig(training=training, out=str(tmp_path))
    assert (
        StudyConfig(training="epochs=2,readout=bins,adapter_scope=always").training
        == "epochs=2,readout=bins,adapter_scope=always"
    )


def test_cells_as_text():
    assert cell("hit@8 %", 0.9512) == "95.1"
    assert cell("95 %", (0.1, 0.255)) == "10.0 to 25.5"
    assert cell("p", 0.0001) == "<0.001"
    assert cell("groups", 12345) == "12,345"
    assert cell("x", None) == "–"
