"""Labelling by prefill says at every step what the two models say when they read the prefix alone."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from s2t.core.support import align_vocabulary, divergence, entropy, mask_forbidden, rank_of
from s2t.decode import label as label_module
from s2t.decode.label import Labels, label

NUM_CANDIDATES = 5


@pytest.fixture(scope="module")
def trajectories(write, strategy, prompts):
    done = write(strategy("s2t", trigger="random", threshold=0.3))
    return list(prompts), [sequence.token_ids for sequence in done]


@pytest.fixture(scope="module")
def labels(slm, llm, trajectories):
    return label(slm, llm, *trajectories, NUM_CANDIDATES)


@torch.inference_mode()
def uncached_logits(loaded, ids, slm):
    """The next-token logits after `ids` by the model's own forward, without a cache, on the SLM's vocabulary."""
    logits = loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
    reserved = torch.tensor(slm.reserved.all)
    return mask_forbidden(align_vocabulary(logits, slm.vocab_size), reserved, slm.vocab_size)


def step_by_step(slm, llm, prompt, generated):
    rows = []
    for t in range(len(generated)):
        left, right = (uncached_logits(loaded, [*prompt, *generated[:t]], slm) for loaded in (slm, llm))
        ids = left.topk(NUM_CANDIDATES).indices
        rows.append(
            (
                divergence(right, left),
                entropy(left),
                rank_of(left, right.argmax(-1)),
                ids,
                left.log_softmax(-1)[ids],
                right.softmax(-1)[ids],
            )
        )
    return Labels(*(torch.stack(column).numpy() for column in zip(*rows, strict=True)))


def assert_equal_labels(left, right):
    for item in fields(Labels):
        one, other = getattr(left, item.name), getattr(right, item.name)
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=2e-4, err_msg=item.name)
        else:  # tokens as unlikely as each other may change places, far from the candidates
            far = (one >= NUM_CANDIDATES) & (np.abs(one - other) <= 1) if item.name == "rank" else False
            np.testing.assert_array_equal(np.where(far, one, other), one, err_msg=item.name)


def test_labels_by_batched_prefill_are_those_of_uncached_forwards_step_by_step(slm, llm, trajectories, labels):
    for prompt, generated, found in zip(*trajectories, labels, strict=True):
        assert len(found.divergence) == len(generated)
        assert_equal_labels(found, step_by_step(slm, llm, prompt, generated))


def test_labels_do_not_depend_on_the_batch(slm, llm, trajectories, labels, monkeypatch):
    for prompt, generated, found in zip(*trajectories, labels, strict=True):
        assert_equal_labels(found, label(slm, llm, [prompt], [generated], NUM_CANDIDATES)[0])
    monkeypatch.setattr(label_module, "_TOKENS_AT_ONCE", {"cpu": 60})
    monkeypatch.setattr("s2t.core.support._LOGITS_AT_ONCE", {"cpu": 7 * slm.vocab_size})
    monkeypatch.setattr(label_module, "_STEPS_AT_ONCE", 1)
    for small, found in zip(label(slm, llm, *trajectories, NUM_CANDIDATES), labels, strict=True):
        assert_equal_labels(small, found)


def test_candidates_are_the_slms_best_and_never_reserved(slm, labels):
    for found in labels:
        assert not set(found.candidate_ids.ravel().tolist()) & set(slm.reserved.all)
        assert (np.diff(found.slm_logprobs, axis=1) <= 0).all()
        assert (found.llm_probs >= 0).all() and (found.llm_probs.sum(1) <= 1 + 1e-4).all()


def test_the_llms_choice_is_a_candidate_exactly_where_its_rank_is_below_k(labels):
    for found in labels:
        is_sure = found.llm_probs.max(1) > 0.5  # then the LLM's choice is this candidate
        place = found.llm_probs.argmax(1)
        assert (found.rank[is_sure] == place[is_sure]).all()


def test_a_pair_of_one_model_has_no_divergence_and_rank_0(slm, new_model, trajectories):
    for found in label(slm, new_model(0), *trajectories, NUM_CANDIDATES):
        assert (found.divergence >= 0).all() and (found.divergence < 1e-4).all()
        assert (found.rank == 0).all()


def test_more_candidates_than_tokens_stores_every_token(slm, llm, trajectories):
    prompts, generated = trajectories
    found = label(slm, llm, prompts[:1], generated[:1], 10_000)[0]
    assert found.candidate_ids.shape[1] == slm.vocab_size
