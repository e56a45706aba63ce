"""Losses: where they are zero, what lowers them, and that no input makes them infinite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from s2t.core.losses import (
    criticality_loss,
    distillation_kl,
    listwise_kl,
    lm_preserving_kl,
    pairwise_margin,
    selection_cross_entropy,
)
from s2t.core.support import Distribution

groups = st.integers(0, 10_000)


def group(seed, num_groups=3, k=5):
    """Random scores and absolute LLM probabilities, [G, K] each; the rest of the mass lies outside."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_groups, k, generator=generator)
    probs = torch.randn(num_groups, k + 3, generator=generator).softmax(-1)[:, :k]
    return scores, probs


@given(seed=groups)
def test_no_loss_is_negative(seed):
    scores, probs = group(seed)
    for loss in (
        selection_cross_entropy(scores, probs),
        pairwise_margin(scores.sigmoid(), probs, 0.1),
        listwise_kl(scores, probs),
        lm_preserving_kl(scores, probs.log()),
    ):
        assert loss.shape == ()
        assert loss >= -1e-6


def test_cross_entropy_falls_as_the_llms_choice_rises():
    _, probs = group(0)
    best = F.one_hot(probs.argmax(-1), 5).float()
    values = [float(selection_cross_entropy(best * size, probs)) for size in (0, 1, 5, 50)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(0, abs=1e-6)


def test_cross_entropy_takes_the_llms_favourite_as_its_class():
    scores, probs = group(1)
    picked = scores.log_softmax(-1).gather(-1, probs.argmax(-1, keepdim=True))
    torch.testing.assert_close(selection_cross_entropy(scores, probs), -picked.mean())


def test_the_margin_is_zero_once_the_choice_leads_by_it():
    probs = torch.tensor([[0.2, 0.5, 0.1]])
    assert pairwise_margin(torch.tensor([[0.3, 0.5, 0.39]]), probs, 0.1) == 0
    assert float(pairwise_margin(torch.tensor([[0.3, 0.5, 0.45]]), probs, 0.1)) == pytest.approx(0.025)
    assert float(pairwise_margin(torch.tensor([[0.5, 0.5, 0.5]]), probs, 0.1)) == pytest.approx(0.1)


def test_a_single_candidate_has_nothing_to_be_compared_with():
    one = torch.tensor([[0.7], [0.2]])
    assert pairwise_margin(one, one, 0.1) == 0
    assert selection_cross_entropy(one, one) == 0
    assert listwise_kl(one, one) == 0


@given(seed=groups, shift=st.floats(-5, 5, width=32))
def test_the_listwise_kl_is_zero_where_scores_are_the_llms_log_probabilities(seed, shift):
    _, probs = group(seed)
    assert listwise_kl(probs.log() + shift, probs).abs() < 1e-4


def test_the_listwise_kl_does_not_depend_on_the_mass_outside_the_candidates():
    scores, probs = group(2)
    torch.testing.assert_close(listwise_kl(scores, probs), listwise_kl(scores, probs / 10))


def test_candidates_the_llm_finds_impossible_leave_losses_and_gradients_finite():
    scores = torch.randn(2, 4, requires_grad=True)
    probs = torch.tensor([[0.5, 0.0, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]])
    loss = listwise_kl(scores, probs) + selection_cross_entropy(scores, probs)
    (loss + pairwise_margin(scores, probs, 0.1)).backward()
    assert loss.isfinite()
    assert scores.grad is not None and scores.grad.isfinite().all()


def test_the_lm_kl_is_zero_for_equal_models_and_a_mean_over_positions():
    torch.manual_seed(0)
    base, adapted = torch.randn(6, 20), torch.randn(6, 20)
    assert lm_preserving_kl(base, base + 3.0).abs() < 1e-5
    p, q = base.log_softmax(-1), adapted.log_softmax(-1)
    torch.testing.assert_close(lm_preserving_kl(base, adapted), (p.exp() * (p - q)).sum(-1).mean())


def test_half_precision_logits_give_float32_losses():
    torch.manual_seed(0)
    logits = torch.randn(4, 10).bfloat16()
    assert lm_preserving_kl(logits, logits.flip(0)).dtype == torch.float32
    assert criticality_loss(logits[:, 0], torch.ones(4), 2.0).dtype == torch.float32


def test_the_class_weight_counts_a_positive_as_often_as_it_says():
    logits, labels = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0])
    repeated = F.binary_cross_entropy_with_logits(
        torch.tensor([0.3] * 4 + [-1.0, 2.0]), torch.tensor([1.0] * 4 + [0.0, 0.0]), reduction="sum"
    )
    torch.testing.assert_close(criticality_loss(logits, labels, 4.0) * 3, repeated)


def test_criticality_of_no_steps_is_zero_and_has_a_gradient():
    logits = torch.zeros(0, requires_grad=True)
    loss = criticality_loss(logits, torch.zeros(0), 3.0)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None


def test_criticality_learns_towards_the_label():
    labels = torch.tensor([1.0, 0.0])
    right, wrong = torch.tensor([4.0, -4.0]), torch.tensor([-4.0, 4.0])
    assert criticality_loss(right, labels, 5.0) < criticality_loss(wrong, labels, 5.0)


@given(seed=groups, size=st.integers(1, 9), temperature=st.sampled_from([0.5, 1.0, 4.0]))
def test_distillation_is_a_lower_bound_of_the_full_kl_and_zero_for_equal_models(seed, size, temperature):
    generator = torch.Generator().manual_seed(seed)
    llm, slm = (3 * torch.randn(4, 9, generator=generator) for _ in range(2))
    ids = llm.topk(size, dim=-1).indices
    probs = Distribution(llm / temperature).buckets(ids)
    slm.requires_grad_(True)
    loss = distillation_kl(slm, ids, probs, temperature)
    full = F.kl_div((slm / temperature).log_softmax(-1), (llm / temperature).softmax(-1), reduction="sum")
    assert -1e-4 <= loss <= temperature**2 * full + 1e-3
    assert float(distillation_kl(llm, ids, probs, temperature)) == pytest.approx(0, abs=1e-3)
    [gradient] = torch.autograd.grad(loss, slm)
    assert gradient.isfinite().all()
    if size == 9:
        torch.testing.assert_close(loss, temperature**2 * full, rtol=1e-4, atol=1e-4)
