"""The shared-prefix forward is one separate forward per candidate, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from s2t.core.support import propose
from s2t.model.engine import Engine
from s2t.train.dataset import make_batch
from s2t.train.forward import FrozenPrefixes, States, forward, lm_kl

every_scope = pytest.mark.parametrize("scope", ["step", "rank-stream", "candidates", "always", "stream"])


@pytest.fixture
def batch(data, trajectories):
    return make_batch(trajectories, data.threshold, data.warmup_steps, torch.device("cpu"))


def last_hidden(adapter, ids, cache=None):
    """[T, H] of one sequence by the model's own forward; its own cache, masks and positions."""
    decoder = adapter.base_model.get_decoder()
    return decoder(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=cache is not None).last_hidden_state[
        0
    ]


def candidate_alone(adapter, prefix, candidate):
    """The state of one candidate after one prefix, everything recomputed."""
    if adapter.scope not in ("candidates", "step"):
        adapter.act(True)
        return last_hidden(adapter, [*prefix, candidate])[-1]
    cache = DynamicCache()
    adapter.act(False)
    with torch.no_grad():
        last_hidden(adapter, prefix, cache)
    adapter.act(True)
    return last_hidden(adapter, [candidate], cache)[-1]


def naive_states(adapter, trajectories, warmup_steps):
    """What `forward` returns, one sequence and one candidate at a time."""
    candidates, steps, base_steps = [], [], []
    for t in trajectories:
        ids = t.ids.tolist()
        live = slice(len(t.prompt_ids) - 1 + warmup_steps, None)
        adapter.act(False)
        base = last_hidden(adapter, ids)[live].detach()
        base_steps.append(base)
        adapter.act(True)
        steps.append(last_hidden(adapter, ids)[live] if adapter.scope == "always" else base)
        for step, group in zip(t.group_steps.tolist(), t.candidate_ids.tolist(), strict=True):
            prefix = ids[: len(t.prompt_ids) + step]
            if adapter.ranks:  # the prefix's last token once more, behind those before it
                candidates.append(candidate_alone(adapter, prefix[:-1], prefix[-1])[None])
            else:
                candidates.append(torch.stack([candidate_alone(adapter, prefix, c) for c in group]))
    is_always = adapter.scope == "always"
    return States(torch.stack(candidates), torch.cat(steps), torch.cat(base_steps) if is_always else None)


def train_mode(trainer):
    trainer.train_mode()
    trainer.adapter.act(True)


@every_scope
def test_shared_prefixes_equal_one_uncached_forward_per_candidate(scope, new_adapter, batch, trajectories):
    adapter = new_adapter(scope)
    with torch.no_grad():
        shared, naive = forward(adapter, batch), naive_states(adapter, trajectories, 3)
    torch.testing.assert_close(shared.candidates, naive.candidates, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.steps, naive.steps, rtol=1e-4, atol=1e-5)
    if scope == "always":
        torch.testing.assert_close(shared.base_steps, naive.base_steps, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(shared.steps, shared.base_steps, atol=1e-2)
    else:
        assert shared.base_steps is None


@every_scope
@pytest.mark.parametrize("criticality", ["head", "reserved"])
def test_gradients_equal_those_of_one_uncached_forward_per_candidate(
    scope, criticality, new_adapter, new_trainer, batch, trajectories
):
    adapter = new_adapter(scope, criticality=criticality)
    trainer = new_trainer(adapter, criticality=criticality, lora_dropout=0.0)
    train_mode(trainer)
    found = []
    for run in (lambda: forward(adapter, batch), lambda: naive_states(adapter, trajectories, 3)):
        losses = trainer.losses(run(), batch)
        assert ("lm" in losses) == (scope == "always")
        parameters = list(trainer.parameters.values())
        total = torch.stack(list(losses.values())).sum()
        found.append((losses, torch.autograd.grad(total, parameters)))
    (shared_losses, shared), (naive_losses, naive) = found
    for name, loss in shared_losses.items():
        torch.testing.assert_close(loss, naive_losses[name], rtol=1e-4, atol=1e-5, msg=name)
    for name, left, right in zip(trainer.parameters, shared, naive, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-5, msg=name)
    assert all(
        float(left.abs().max()) > 0 for name, left in zip(trainer.parameters, shared, strict=True) if "bins" in name
    )
    assert any("bins" in name for name in trainer.parameters) != adapter.ranks
    assert sum(float(left.abs().max()) > 0 for left in shared) >= len(shared) - 2


@pytest.mark.parametrize("scope", ["step", "candidates"])
def test_a_frozen_prefix_gets_no_gradient(scope, new_adapter, batch):
    adapter = new_adapter(scope)
    states = forward(adapter, batch)
    assert not states.steps.requires_grad
    assert states.candidates.requires_grad


@every_scope
def test_a_batch_of_one_trajectory_gives_what_a_batch_of_many_gives(scope, new_adapter, batch, data, trajectories):
    adapter = new_adapter(scope)
    with torch.no_grad():
        together = forward(adapter, batch)
        alone = [
            forward(adapter, make_batch([t], data.threshold, data.warmup_steps, torch.device("cpu")))
            for t in trajectories
        ]
    for name in ("candidates", "steps"):
        parts = torch.cat([getattr(states, name) for states in alone])
        torch.testing.assert_close(getattr(together, name), parts, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_learned_nothing_keeps_the_language_model(new_adapter, batch):
    found = {}
    for is_fresh in (True, False):
        adapter = new_adapter("always", is_fresh=is_fresh)
        with torch.no_grad():
            found[is_fresh] = float(lm_kl(adapter, forward(adapter, batch)))
    assert found[True] == pytest.approx(0.0, abs=1e-6)
    assert found[False] > 1e-3


def test_the_kl_to_the_base_is_the_same_in_chunks(new_adapter, batch, monkeypatch):
    adapter = new_adapter("always")
    states = forward(adapter, batch)
    whole = lm_kl(adapter, states)
    gradient = torch.autograd.grad(whole, states.steps, retain_graph=True)[0]
    monkeypatch.setattr("s2t.train.forward._LOGITS_AT_ONCE", 7 * 50)
    parts = lm_kl(adapter, states)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, states.steps)[0], gradient)


@every_scope
def test_the_loss_falls_on_a_small_fixed_set(scope, new_adapter, new_trainer):
    trainer = new_trainer(new_adapter(scope, is_fresh=True), learning_rate=1e-2, epochs=30.0, batch_groups=1000)
    trainer.fit()
    losses = [line["loss"] for line in trainer.log]
    assert len(losses) == trainer.num_steps == 30
    assert losses[-1] < 0.8 * losses[0]
    assert all(losses[-1] < loss for loss in losses[:10])


@every_scope
def test_training_leaves_the_base_models_weights(scope, new_adapter, new_trainer):
    adapter = new_adapter(scope)
    before = {name: p.clone() for name, p in adapter.base_model.named_parameters() if "lora_" not in name}
    new_trainer(adapter, learning_rate=1e-2, epochs=2.0).fit()
    assert all(torch.equal(p, before[name]) for name, p in adapter.base_model.named_parameters() if name in before)


@pytest.mark.parametrize("scope", ["step", "candidates"])
@pytest.mark.parametrize("tokens_at_once", [1, 30, 4096])
def test_prefixes_read_once_are_those_read_at_every_step(
    tokens_at_once, scope, new_adapter, data, trajectories, monkeypatch
):
    monkeypatch.setattr("s2t.train.forward._TOKENS_AT_ONCE", tokens_at_once)
    adapter = new_adapter(scope)
    frozen = FrozenPrefixes(adapter, trajectories)
    order = list(range(len(trajectories)))[::-1]
    batch = make_batch([trajectories[i] for i in order], data.threshold, data.warmup_steps, torch.device("cpu"))
    with torch.no_grad():
        direct, stored = forward(adapter, batch), forward(adapter, batch, frozen.take(order))
    torch.testing.assert_close(stored.candidates, direct.candidates, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored.steps, direct.steps, rtol=1e-4, atol=1e-5)


def test_the_size_of_frozen_prefixes_is_what_they_take(new_adapter, trajectories):
    adapter = new_adapter("candidates")
    frozen = FrozenPrefixes(adapter, trajectories)
    held = [frozen._hidden, *(tensor for layer in frozen._layers for tensor in layer)]
    assert FrozenPrefixes.size(adapter, trajectories) == sum(t.numel() * t.element_size() for t in held)


@every_scope
def test_kept_steps_are_the_quiet_ones_that_look_most_critical(scope, new_adapter, data, trajectories):
    adapter = new_adapter(scope)
    batch = make_batch(trajectories, data.threshold, data.warmup_steps, torch.device("cpu"))
    count, last = len(batch.group_row), batch.last_ids.clone()
    with torch.no_grad():
        plain, kept = forward(adapter, batch), forward(adapter, batch, kept_per_group=1.0)
    torch.testing.assert_close(kept.candidates[:count], plain.candidates, rtol=1e-4, atol=1e-5)
    assert torch.equal(batch.last_ids[:count], last) and len(kept.candidates) == len(batch.group_row) > count
    engine = Engine(adapter.loaded, 1, adapter)
    for place in range(count, len(batch.group_row)):
        t = trajectories[int(batch.group_row[place])]
        step = int(batch.prefix_lengths[place]) - len(t.prompt_ids)
        assert step >= data.warmup_steps and t.divergence[step] <= data.threshold
        adapter.act(False)
        with torch.no_grad():
            logits = engine.logits(last_hidden(adapter, t.ids.tolist()[: len(t.prompt_ids) + step])[-1:])
        ids, logprobs = propose(logits, batch.candidate_ids.shape[1])
        assert torch.equal(batch.candidate_ids[place], ids[0])
        torch.testing.assert_close(batch.llm_probs[place], logprobs[0].exp(), rtol=1e-3, atol=1e-5)


def test_kept_steps_of_a_trajectory_do_not_depend_on_the_batch(new_adapter, data, trajectories):
    adapter = new_adapter("step")

    def kept(chosen):
        batch = make_batch(chosen, data.threshold, data.warmup_steps, torch.device("cpu"))
        count = len(batch.group_row)
        with torch.no_grad():
            forward(adapter, batch, kept_per_group=1.0)
        return list(zip(batch.group_row[count:].tolist(), batch.prefix_lengths[count:].tolist(), strict=True))

    alone = [(row, length) for row, t in enumerate(trajectories) for _, length in kept([t])]
    assert kept(trajectories) == alone
