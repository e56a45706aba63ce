"""Stop strings: streamed text is the text before the first one, and no piece ever holds any part of one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2t.model.chat import Detokenizer, decode_ids
from s2t.model.stops import StoppingText, Stops, cut


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(tokenizer, ids, stops):
    """Pieces in order, and at which token the text was over (None: never)."""
    text, pieces, over = StoppingText(tokenizer, stops), [], None
    for place, token_id in enumerate(ids):
        pieces.append(text.push(token_id))
        if text.is_over:
            over = place
            break
    return [*pieces, text.finish()], over


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("abcabd", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("line\n\nnext", ["\n\n", "n\n"], "line"),
        ("", ["x"], ""),
        ("stop", ["stop"], ""),
    ],
)
def test_text_ends_before_the_first_stop_string(text, stops, expected, tokenizer):
    assert cut(text, stops) == expected
    assert "".join(pieces_of(tokenizer, ids_of(tokenizer, text), stops)[0]) == expected


@given(
    ids=st.lists(st.integers(0, 1023), max_size=60),
    stops=st.lists(st.text("ab e1#\n", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_the_text_before_the_first_stop_string(ids, stops, tokenizer):
    pieces, over = pieces_of(tokenizer, ids, stops)
    read = ids if over is None else ids[: over + 1]
    assert "".join(pieces) == cut(decode_ids(tokenizer, read), stops)
    if over is not None:
        assert "".join(pieces) == cut(decode_ids(tokenizer, ids), stops)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    pieces, over = pieces_of(tokenizer, ids_of(tokenizer, "a#"), ["####"])
    assert over is None
    assert (pieces[-1], "".join(pieces)) == ("#", "a#")


@given(ids=st.lists(st.integers(0, 1023), min_size=30, max_size=150))
def test_long_texts_are_detokenized_as_a_whole_would_be(ids, tokenizer):
    text = Detokenizer(tokenizer)
    assert "".join([*(text.push(i) for i in ids), text.finish()]) == decode_ids(tokenizer, ids)


def test_requests_end_independently(tokenizer):
    stops = Stops(tokenizer, ["two"])
    ids = ids_of(tokenizer, "one two")
    first = [stops.ends(0, token_id) for token_id in ids]
    assert first == [False] * (len(ids) - 1) + [True]
    assert [stops.ends(1, token_id) for token_id in ids[:-1]] == first[:-1]


def test_a_stop_string_that_is_a_token_of_its_own_ends_by_its_id(tokenizer):
    stops = Stops(tokenizer, ["<|user|>"])
    assert not stops.ends(0, 100)
    assert stops.ends(0, tokenizer.convert_tokens_to_ids("<|user|>"))
