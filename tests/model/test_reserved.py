"""Reserved ids: each family's spare tokens, else padding rows, else rows to add; distinct, never in use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.engine import Engine
from s2t.model.reserved import choose_reserved_ids, spare_tokens_in

WORDS = {f"word{i}": i for i in range(100)}
FAMILIES = {
    "embedded pair": "<|reserved_{}|>",
    "gemma": "<unused{}>",
    "llama-3": "<|reserved_special_token_{}|>",
    "mistral": "[control_{}]",
    "mistral-tekken": "<SPECIAL_{}>",
    "phi": "<|dummy_{}|>",
    "falcon": ">>UNUSED_{}<<",
    "deepseek": "<｜place▁holder▁no▁{}｜>",
}


def vocabulary(pattern, count, first=0):
    """100 words, then `count` spare tokens."""
    return WORDS | {pattern.format(first + i): 100 + i for i in range(count)}


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_gives_its_spare_tokens(family):
    vocab = vocabulary(FAMILIES[family], 30)
    ids = choose_reserved_ids(vocab, 200, 16)
    assert ids.kind == f"{family} spare tokens"
    assert ids.all == tuple(range(112, 130))  # the last ones: the first are the likeliest to be used by a fine-tune
    assert (len(ids.bins), len(ids.criticality)) == (16, 2)


def test_spare_tokens_are_ordered_by_number_not_by_name():
    ids = choose_reserved_ids(vocabulary("<unused{}>", 18, first=5), 118, 16)
    assert ids.all == tuple(range(100, 118))


def test_too_few_spare_tokens_fall_back_to_padding_rows():
    ids = choose_reserved_ids(vocabulary("<unused{}>", 17), 160, 16)
    assert ids.kind == "padding rows"
    assert ids.all == tuple(range(142, 160))


def test_rows_past_the_last_token_serve_as_in_qwen():
    ids = choose_reserved_ids(WORDS, 118, 16)
    assert (ids.kind, ids.all) == ("padding rows", tuple(range(100, 118)))


def test_without_padding_rows_there_are_rows_to_add():
    ids = choose_reserved_ids(WORDS, 117, 16)
    assert (ids.kind, ids.all) == ("added rows", tuple(range(117, 135)))


def test_rows_to_add_come_after_the_last_token_even_if_the_embedding_ends_before():
    assert choose_reserved_ids(WORDS, 90, 2).all == tuple(range(100, 104))


@given(
    family=st.sampled_from(sorted(FAMILIES)),
    spare=st.integers(0, 40),
    padding=st.integers(0, 40),
    num_bins=st.integers(2, 32),
)
def test_reserved_ids_are_distinct_and_never_a_word(family, spare, padding, num_bins):
    vocab = vocabulary(FAMILIES[family], spare)
    ids = choose_reserved_ids(vocab, len(vocab) + padding, num_bins)
    assert len(set(ids.all)) == num_bins + 2
    assert not set(ids.all) & set(WORDS.values())


def test_the_embedded_pair_has_tokens_to_spare(tiny_slm, tiny_llm):
    assert tiny_slm.reserved == tiny_llm.reserved
    assert tiny_slm.reserved.kind == "embedded pair spare tokens"
    names = tiny_slm.tokenizer.convert_ids_to_tokens(list(tiny_slm.reserved.all))
    assert all(name.startswith("<|reserved_") for name in names)


def test_reserved_ids_have_no_probability(tiny_slm):
    engine = Engine(tiny_slm, 1)
    probs = engine.logits(engine.extend([0], [[5, 6, 7]])).softmax(-1)
    assert probs[0, list(tiny_slm.reserved.all)].sum() == 0
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("rows", [1024, 1200])
def test_tied_or_not_reserved_ids_are_never_written_and_a_selector_leaves_the_embeddings(is_tied, rows, random_model):
    loaded = random_model("llama", vocab_size=rows, tie_word_embeddings=is_tied)
    embeddings = [loaded.model.get_input_embeddings().weight, loaded.model.get_output_embeddings().weight]
    assert (embeddings[0] is embeddings[1]) == is_tied
    before = [weight.clone() for weight in embeddings]
    adapter = SelectorAdapter(loaded, AdapterConfig("x", loaded.fingerprint, scope="always"))
    engine = Engine(loaded, 1, adapter)
    logits = engine.logits(engine.extend([0], [[5, 6, 700]]))
    assert logits[0, list(loaded.reserved.all)].max() == float("-inf")
    assert logits.shape[-1] == loaded.vocab_size
    assert all(torch.equal(old, new) for old, new in zip(before, embeddings, strict=True))


def test_spellings_of_spare_tokens_are_found_within_text():
    assert spare_tokens_in("see <unused7>, [control_12] and <|reserved_special_token_5|>") == {
        "<unused7>",
        "[control_12]",
        "<|reserved_special_token_5|>",
    }
    assert not spare_tokens_in("<unused>, [control_x] and <reserved_5>")
