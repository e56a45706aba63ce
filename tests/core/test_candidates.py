"""Proposal of candidates, and reserved ids that can never be proposed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t.core.support import best_ids, logprobs_at, mask_forbidden, propose
from s2t.errors import ConfigError

logit_rows = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=30)
tied_rows = st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=2, max_size=30)


@given(row=logit_rows | tied_rows, data=st.data())
def test_candidates_are_distinct_best_first_and_begin_with_argmax(row, data):
    logits = torch.tensor([row])
    k = data.draw(st.integers(1, len(row)))
    ids, logprobs = propose(logits, k)
    assert ids.shape == logprobs.shape == (1, k)
    assert len(set(ids[0].tolist())) == k
    assert ids[0, 0] == logits[0].argmax()
    assert logprobs[0].tolist() == sorted(logprobs[0].tolist(), reverse=True)
    torch.testing.assert_close(logprobs[0], logits[0].log_softmax(-1)[ids[0]], rtol=1e-4, atol=1e-5)


def test_candidates_of_equal_logits_begin_with_the_lowest_id():
    ids, _ = propose(torch.zeros(3, 500), 4)
    assert ids[:, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_id_is_the_lowest_of_equals_and_a_nan_where_there_is_one(dtype):
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[0.0, 2.0, 2.0], [1.0, nan, 5.0], [-inf, -inf, -inf], [-inf, inf, inf]], dtype=dtype)
    assert best_ids(rows).tolist() == [1, 1, 0, 1]
    assert best_ids(rows[:0]).shape == (0,)


def test_rows_are_proposed_independently():
    torch.manual_seed(0)
    logits = torch.randn(5, 40)
    ids, logprobs = propose(logits, 6)
    for row in range(5):
        alone_ids, alone_logprobs = propose(logits[row : row + 1], 6)
        assert torch.equal(ids[row], alone_ids[0])
        torch.testing.assert_close(logprobs[row], alone_logprobs[0])


@pytest.mark.parametrize("k", [0, 11])
def test_more_candidates_than_tokens_are_refused_with_both_numbers(k):
    with pytest.raises(ConfigError, match=rf"1\.\.10 .*got {k}"):
        propose(torch.zeros(1, 10), k)


def test_masking_cuts_padding_rows_and_forbids_ids():
    logits = mask_forbidden(torch.ones(2, 12, dtype=torch.bfloat16), torch.tensor([3, 5]), 10)
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32
    assert logits.isneginf().nonzero()[:, 1].tolist() == [3, 5, 3, 5]


def test_masking_leaves_its_input_as_it_was():
    logits = torch.ones(1, 4)
    mask_forbidden(logits, torch.tensor([1]), 4)
    assert logits.tolist() == [[1, 1, 1, 1]]


@given(row=st.lists(st.floats(-20, 20, width=32), min_size=12, max_size=12), data=st.data())
def test_reserved_ids_are_never_proposed_whatever_the_logits(row, data):
    forbidden = data.draw(st.sets(st.integers(0, 11), max_size=6))
    logits = mask_forbidden(torch.tensor([row]), torch.tensor(sorted(forbidden)).long(), 12)
    ids, logprobs = propose(logits, 12 - len(forbidden))
    assert not forbidden & set(ids[0].tolist())
    assert logprobs.exp().sum() == pytest.approx(1, abs=1e-4)


@given(row=logit_rows | tied_rows)
def test_the_best_of_half_precision_is_the_argmax_of_the_same_numbers(row):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.tensor([row, row[::-1]]).to(dtype)
        assert torch.equal(best_ids(logits), logits.float().argmax(-1))


def test_the_best_of_a_row_with_nan_is_the_nan():
    logits = torch.tensor([[1.0, float("nan"), 2.0]])
    assert best_ids(logits).tolist() == best_ids(logits.bfloat16()).tolist() == [1]


def test_half_precision_is_summed_in_float32():
    torch.manual_seed(0)
    logits = (3 * torch.randn(9, 5000)).bfloat16()
    ids, logprobs = propose(logits, 5)
    same, wanted = propose(logits.float(), 5)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, wanted)
    torch.testing.assert_close(logprobs_at(logits, same), wanted)
    assert torch.equal(ids[:, 0], same[:, 0])
