"""Held-out groups: problems on one side only, weights and thresholds that do no harm, training that stops in time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from s2t.core.rule import score
from s2t.train.trainer import Trainer
from s2t.train.validation import HeldOut, split_by_problem


def rank_combine(readings, logprobs, weight):
    return score(readings, logprobs, weight, 1 - weight)


def held_out(
    readings, logprobs, probs, criticality=(0.9, 0.2, 0.1, 0.6), is_critical=(True, False, False, False), problems=None
):
    return HeldOut(
        torch.tensor(readings).log(),
        torch.tensor(logprobs).log(),
        torch.tensor(probs),
        np.array(criticality, dtype=np.float32),
        np.array(is_critical),
        np.array([f"problem {i}" for i in range(len(readings))]) if problems is None else np.array(problems),
    )


SLM = [[0.6, 0.4], [0.7, 0.3], [0.55, 0.45], [0.8, 0.2]]
LLM = [[0.1, 0.9], [0.8, 0.2], [0.2, 0.8], [0.9, 0.1]]


def test_a_problem_is_on_one_side_whatever_else_there_is(trajectories):
    doubled = [*trajectories, *trajectories]
    training, held = split_by_problem(doubled, 0.4)
    assert sorted(training + held) == list(range(len(doubled)))
    assert held and not {doubled[i].problem_id for i in training} & {doubled[i].problem_id for i in held}
    alone = set(split_by_problem(trajectories, 0.4)[1])
    assert {i % len(trajectories) for i in held} == alone


def test_without_a_share_nothing_is_held_out_and_something_is_always_trained_on(trajectories):
    assert split_by_problem(trajectories, 0.0)[1] == []
    training, held = split_by_problem(trajectories[:1], 0.9)
    assert (training, held) == ([0], [])


def test_a_reading_that_knows_the_llm_gets_all_the_weight():
    found = held_out(LLM * 4, SLM * 4, LLM * 4)
    assert found.best_weight(rank_combine) == 1.0
    assert found.quality(rank_combine, 1.0)["agreement"] == 1.0
    assert found.slm()["agreement"] == 0.5


def test_a_reading_that_is_noise_gets_no_weight():
    found = held_out([[0.1, 0.9], [0.1, 0.9], [0.9, 0.1], [0.1, 0.9]], SLM, LLM)
    assert found.best_weight(rank_combine) == 0.0
    report = found.report(rank_combine, 0.0, 0.5)
    assert report["chosen"] == report["slm"]


def test_an_overconfident_reading_is_mixed_with_the_slms_own():
    sure = [[0.001, 0.999], [0.001, 0.999], [0.001, 0.999], [0.999, 0.001]]
    found = held_out(sure * 50, [[0.5, 0.5], [0.8, 0.2], [0.5, 0.5], [0.8, 0.2]] * 50, LLM * 50)
    assert 0 < found.best_weight(rank_combine) < 1


def test_a_reading_that_is_surer_and_no_more_often_right_gets_no_weight():
    surer = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]]  # right at three of four, as the SLM's own order is
    llm = [[0.95, 0.05], [0.95, 0.05], [0.05, 0.95], [0.95, 0.05]]
    own = [[0.6, 0.4], [0.6, 0.4], [0.6, 0.4], [0.6, 0.4]]
    found = held_out(surer * 50, own * 50, llm * 50)
    assert found.quality(rank_combine, 0.5)["nll"] < found.slm()["nll"]
    assert found.best_weight(rank_combine) == 0.0


@pytest.mark.parametrize(("times", "weight"), [(2, 0.0), (4, 1.0)])
def test_a_gain_that_chance_explains_gets_no_weight(times, weight):
    found = held_out(LLM * times, SLM * times, LLM * times)  # won at every second group: p = 0.125, then 0.008
    assert found.best_weight(rank_combine) == weight


def test_the_threshold_fires_as_often_as_there_are_divergence_points():
    found = held_out(LLM, SLM, LLM)
    assert (found.criticality > found.threshold()).mean() == pytest.approx(found.is_critical.mean())
    assert found.average_precision() == 1.0
    alike = held_out(LLM, SLM, LLM, is_critical=(False,) * 4)
    assert alike.average_precision() is None


def test_groups_of_one_problem_are_one_witness():
    parts = (LLM * 50, SLM * 50, LLM * 50)
    assert held_out(*parts).best_weight(rank_combine) == 1.0
    assert (
        held_out(*parts, problems=[f"{i % 5}" for i in range(200)]).best_weight(rank_combine) == 0.0
    )  # 5 of 5: p = 0.0625


@pytest.mark.parametrize("scope", ["step", "rank-stream", "candidates"])
def test_the_best_weights_are_kept_and_training_stops(scope, new_adapter, new_trainer):
    settings = {"heldout_problems": 0.5, "validation_steps": 1, "patience": 2, "epochs": 40.0, "learning_rate": 0.3}
    trainer = new_trainer(new_adapter(scope, is_fresh=True), batch_groups=2, **settings)
    planned = trainer.num_steps
    trainer.fit()
    losses = [line["nll"] for line in trainer.validation]
    best = losses.index(min(losses))
    assert trainer.step == len(losses) == best + 3 < planned, "a rate this high stops getting better at once"
    found = trainer.read_held_out().quality(trainer.adapter.combined, 1.0)
    assert found["nll"] == pytest.approx(min(losses), rel=1e-4)


def test_a_resumed_run_remembers_the_best_weights(new_adapter, new_trainer, monkeypatch):
    settings = {"heldout_problems": 0.5, "validation_steps": 1, "patience": 0, "epochs": 6.0, "learning_rate": 0.05}
    whole = new_trainer(new_adapter("step", is_fresh=True), "whole", batch_groups=2, **settings)
    whole.fit()

    class Killed(Exception):
        pass

    def after_step(self):
        own(self)
        if self.step == 5:
            self._save()
            raise Killed

    own = Trainer.after_step
    killed = new_trainer(new_adapter("step", is_fresh=True), "killed", batch_groups=2, **settings)
    monkeypatch.setattr(Trainer, "after_step", after_step)
    with pytest.raises(Killed):
        killed.fit()
    monkeypatch.setattr(Trainer, "after_step", own)
    resumed = new_trainer(new_adapter("step", is_fresh=True), "killed", batch_groups=2, **settings)
    resumed.fit()
    assert json.dumps(resumed.validation) == json.dumps(whole.validation)
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(resumed.parameters[name], parameter, rtol=0, atol=0)


def test_an_adapter_that_is_no_better_than_the_slm_gets_weight_0(new_adapter, new_trainer, data):
    data.trajectories[:] = [replace(t, llm_probs=np.exp(t.slm_logprobs)) for t in data.trajectories]
    trainer = new_trainer(new_adapter("step", is_fresh=True), heldout_problems=0.5, max_steps=1, learning_rate=1e-12)
    trainer.fit()
    config = trainer.adapter_config(trainer.summary())
    assert config.adapter_weight == 0.0
    assert 0 < config.thresholds["criticality"] < 1


@pytest.mark.parametrize(("scope", "is_zero"), [("always", True), ("step", False)])
def test_a_lora_that_would_change_the_lm_is_zero_where_it_earned_no_weight(scope, is_zero, new_adapter, new_trainer):
    trainer = new_trainer(new_adapter(scope, is_fresh=True), heldout_problems=0.5, max_steps=2, learning_rate=0.1)
    trainer.fit()
    config = replace(trainer.adapter.config, adapter_weight=0.0)
    last = {name: value for name, value in trainer.weights_to_save(config).items() if "lora_B" in name}
    assert last and all(bool((value == 0).all()) == is_zero for value in last.values())
    earned = trainer.weights_to_save(replace(config, adapter_weight=0.5))
    assert any(bool((value != 0).any()) for name, value in earned.items() if "lora_B" in name)
