"""Watching a training: what trackers are told, step by step and look by look, and that a missing one is a single line."""

from __future__ import annotations

import math

import pytest

from s2t.cli.main import main
from s2t.errors import ConfigError
from s2t.files import RunFolder, read_jsonl
from s2t.train import watch
from s2t.train.distill import Distiller
from s2t.train.fit import LOG

SETTINGS = {"heldout_problems": 0.5, "validation_steps": 2, "patience": 0, "max_steps": 5, "learning_rate": 0.05}


class StandIn:
    """A tracker as accelerate has them, which keeps what it is told."""

    made: list[StandIn]

    def __init__(self, **place):
        self.place, self.settings, self.lines, self.ends = place, {}, [], 0
        self.made.append(self)

    def start(self):
        self.is_started = True

    def store_init_configuration(self, values):
        assert self.is_started
        self.settings = values

    def log(self, values, step):
        assert not self.ends
        self.lines.append((step, values))

    def finish(self):
        self.ends += 1


@pytest.fixture
def stand_in(monkeypatch):
    """Stands in for wandb and trackio; the trackers made so far."""
    made: list[StandIn] = []
    tracking = pytest.importorskip("accelerate.tracking")
    kind = type("StandIn", (StandIn,), {"made": made})
    monkeypatch.setattr(tracking, "LOGGER_TYPE_TO_CLASS", {"wandb": kind, "trackio": kind})
    return made


def of(tracker, part):
    return {step: values for step, values in tracker.lines if all(name.startswith(f"{part}/") for name in values)}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_sees_every_step_and_every_look(name, stand_in, new_adapter, new_trainer):
    trainer = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, log_with=name, **SETTINGS)
    trainer.fit()
    [tracker] = stand_in
    assert tracker.ends == 1
    assert (tracker.place["run_name"], tracker.place["name"]) == ("s2t", "run")
    assert tracker.settings["learning_rate"] == 0.05
    assert None not in tracker.settings.values()
    steps = of(tracker, "train")
    assert sorted(steps) == [1, 2, 3, 4, 5]
    for step, line in enumerate(trainer.log, start=1):
        assert steps[step] == {f"train/{key}": value for key, value in line.items() if key != "step"}
    assert {"train/loss", "train/listwise", "train/criticality", "train/learning_rate"} <= set(steps[1])
    looks = of(tracker, "held_out")
    assert sorted(looks) == [line["step"] for line in trainer.validation] == [2, 4, 5]
    for line in trainer.validation:
        look = looks[line["step"]]
        assert look["held_out/agreement"] == line["agreement"]
        assert look["held_out/criticality_average_precision"] == line["criticality_average_precision"]
        assert 0 < look["held_out/criticality_average_precision"] <= 1
        so_far = [other for other in trainer.validation if other["step"] <= line["step"]]
        assert look["held_out/best_step"] == min(so_far, key=lambda other: other["nll"])["step"]
        assert {"held_out/nll", "held_out/nll_of_slm", "held_out/agreement_of_slm"} <= set(look)


def test_watching_changes_no_weight(stand_in, new_adapter, new_trainer):
    plain = new_trainer(new_adapter("step", is_fresh=True), "plain", batch_groups=2, **SETTINGS)
    seen = new_trainer(new_adapter("step", is_fresh=True), "seen", batch_groups=2, log_with="wandb", **SETTINGS)
    plain.fit()
    seen.fit()
    for name, parameter in plain.parameters.items():
        assert (seen.parameters[name] == parameter).all()


def test_a_resumed_run_goes_on_in_its_own_place(stand_in, new_adapter, new_trainer):
    settings = SETTINGS | {"max_steps": 4}
    first = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, log_with="wandb", **settings)
    first.num_steps = 2
    first.fit()
    again = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, log_with="wandb", **settings)
    again.begin()
    assert again.step == 2
    again.num_steps = 4
    again.begin = lambda: None
    again.fit()
    one, other = stand_in
    assert one.place == other.place
    assert (sorted(of(one, "train")), sorted(of(other, "train"))) == ([1, 2], [3, 4])


def test_distillation_is_watched_too(stand_in, tmp_path, random_model):
    import numpy as np

    from s2t.config import DistillConfig
    from s2t.train.answers import TrainingAnswer

    config = DistillConfig(out=str(tmp_path), log_with="trackio", max_steps=2, lora_rank=2, batch_answers=1)
    ids = np.arange(2, 8, dtype=np.int32)
    answers = [
        TrainingAnswer(f"task-{place:016x}", ids, ids, ids[:, None], np.ones((6, 2), np.float32)) for place in range(2)
    ]
    Distiller(config, answers, random_model(vocab_size=40), RunFolder.open(tmp_path, "distill", config)).fit()
    [tracker] = stand_in
    assert sorted(of(tracker, "train")) == [1, 2]
    assert {"train/loss", "train/ce", "train/learning_rate"} <= set(of(tracker, "train")[1])
    assert tracker.ends == 1


def test_a_tracker_is_closed_and_accelerate_left_as_it_was_when_training_fails(stand_in, new_adapter, new_trainer):
    from accelerate import PartialState

    trainer = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, log_with="wandb", **SETTINGS)
    trainer.terms = lambda chosen: {"loss": trainer.parameters[next(iter(trainer.parameters))].sum() * math.nan}
    with pytest.raises(Exception, match="not finite"):
        trainer.fit()
    assert stand_in[0].ends == 1
    assert not PartialState._shared_state


def test_a_service_that_is_not_set_up_is_one_line(stand_in, new_adapter, new_trainer, monkeypatch):
    def start(self):
        raise RuntimeError("no API key\nrun: wandb login")

    monkeypatch.setattr(StandIn, "start", start)
    trainer = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, log_with="wandb", **SETTINGS)
    with pytest.raises(
        ConfigError, match=r"^wandb cannot be started: no API key run: wandb login; set it up, or leave"
    ):
        trainer.fit()


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_missing_package_is_one_line_before_any_work(command, monkeypatch, tmp_path, capsys):
    def find(package):
        return None if package == "wandb" else object()

    monkeypatch.setattr(watch, "find_spec", find)
    assert main([command, "--log-with", "wandb", "--out", str(tmp_path / "run")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line == "s2t: error: wandb is not installed; run: pip install 's2t[wandb]'."
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_names_the_known_ones(capsys):
    assert main(["train", "--log-with", "paper"]) == 2
    assert "log_with must be one of tensorboard, wandb, trackio; got 'paper'" in capsys.readouterr().err


def scalars(folder, name):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="pip install 's2t[tensorboard]'"
    )
    return events.EventAccumulator(str(folder)).Reload().Scalars(name)


def test_tensorboard_shows_a_step_once_though_a_killed_run_did_it_twice(new_adapter, new_trainer):
    settings = SETTINGS | {"max_steps": 4, "checkpoint_steps": 2, "log_with": "tensorboard"}
    killed = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, **settings)
    killed.terms, own = lambda chosen: {} if killed.step == 3 else own(chosen), killed.terms
    with pytest.raises(RuntimeError):
        killed.fit()
    resumed = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, **settings)
    resumed.fit()
    assert [event.step for event in scalars(resumed.run.file("tensorboard"), "train/loss")] == [1, 2, 3, 4]


def test_tensorboard_files_hold_what_was_logged(new_adapter, new_trainer):
    trainer = new_trainer(new_adapter("step", is_fresh=True), batch_groups=2, log_with="tensorboard", **SETTINGS)
    trainer.fit()
    folder = trainer.run.file("tensorboard")
    losses = {event.step: event.value for event in scalars(folder, "train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in read_jsonl(trainer.run.file(LOG))})
    for name in ("agreement", "nll", "criticality_average_precision"):
        seen = {event.step: event.value for event in scalars(folder, f"held_out/{name}")}
        assert seen == pytest.approx({line["step"]: line[name] for line in trainer.validation})
    assert len(scalars(folder, "train/learning_rate")) == 5
    assert len(scalars(folder, "held_out/best_step")) == 3
