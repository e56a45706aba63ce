"""Between text and ids: prompts, stop ids, and pieces of text that are never half a character."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from s2t.errors import ConfigError, ModelError
from s2t.model.chat import Detokenizer, decode_ids, prompt_ids, stop_ids
from s2t.model.stops import Stops
from s2t.model.template import render

TEXTS = ["hello world", "héllo 🙂🙃 日本語", "a\n\n  b\t", "👩‍👩‍👧 family", "", "½ × 3 = 1½"]
BOS_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(tokenizer, ids):
    text = Detokenizer(tokenizer)
    return [*(text.push(token_id) for token_id in ids), text.finish()]


@pytest.fixture
def bos_tokenizer():
    """A tokenizer that puts a BOS before every text, as Llama's does."""
    words = ["<s>", "</s>", "<unk>", "one", "two"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def byte_tokenizer():
    """A tokenizer that spells what it does not know in byte tokens, as SentencePiece's do."""
    words = ["</s>", "a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


# Text out


@pytest.mark.parametrize("spelled", [[2, 13, 229, 2], [1, 229], [229, 229, 13, 13, 1], [1, 13, 2]], ids=str)
def test_byte_tokens_that_are_no_character_raise_nothing(spelled, byte_tokenizer):
    pieces = pieces_of(byte_tokenizer, spelled)
    assert len("".join(pieces)) == len(decode_ids(byte_tokenizer, spelled))
    stops = Stops(byte_tokenizer, ["bb"])
    assert not any(stops.ends(0, token) for token in spelled)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(text, tokenizer):
    pieces = pieces_of(tokenizer, ids_of(tokenizer, text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing was held back to the end


@given(text=st.text(max_size=20))
def test_any_text_comes_out_as_it_went_in(text, tokenizer):
    ids = ids_of(tokenizer, text)
    assert "".join(pieces_of(tokenizer, ids)) == decode_ids(tokenizer, ids)


def test_a_character_of_many_tokens_appears_with_its_last_one(tokenizer):
    ids = ids_of(tokenizer, "🙂")
    assert len(ids) > 1
    assert pieces_of(tokenizer, ids) == [*[""] * (len(ids) - 1), "🙂", ""]


def test_an_unfinished_character_is_only_shown_at_the_end(tokenizer):
    pieces = pieces_of(tokenizer, ids_of(tokenizer, "ok 🙂")[:-1])
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "\ufffd" in pieces[-1]


@given(ids=st.lists(st.integers(0, 1023), max_size=60))
def test_a_slow_tokenizer_gives_the_same_pieces(ids, tokenizer):
    slow = SimpleNamespace(decode=tokenizer.decode)  # has no backend of `tokenizers`
    assert pieces_of(slow, ids) == pieces_of(tokenizer, ids)


@given(ids=st.lists(st.integers(0, 1023), max_size=30))
def test_whatever_a_model_writes_the_pieces_join_to_its_decoding(ids, tokenizer):
    assert "".join(pieces_of(tokenizer, ids)) == decode_ids(tokenizer, ids)


def test_special_tokens_are_no_text(tokenizer):
    special = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|user|>", "<|reserved_3|>"])]
    assert decode_ids(tokenizer, [*special, *ids_of(tokenizer, "hi"), *special]) == "hi"
    assert "".join(pieces_of(tokenizer, special)) == ""


# Text in


def test_a_prompt_is_a_user_turn_that_asks_for_an_answer(tokenizer):
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert prompt_ids(tokenizer, "hi") == [user, *ids_of(tokenizer, "hi"), assistant]


def test_a_conversation_keeps_its_turns(tokenizer):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    ids = prompt_ids(tokenizer, turns)
    user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    assert [i for i in ids if i in (user, assistant)] == [user, assistant, user, assistant]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_adds_a_bos_adds_one(bos_tokenizer):
    assert prompt_ids(bos_tokenizer, "one two") == [0, 3, 4]


def test_a_template_that_brings_a_bos_gets_no_second_one(bos_tokenizer):
    bos_tokenizer.chat_template = BOS_TEMPLATE
    assert prompt_ids(bos_tokenizer, "one two") == [0, 3, 4]


def test_without_a_template_messages_are_joined(bos_tokenizer):
    turns = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]
    assert prompt_ids(bos_tokenizer, turns) == [0, 3, 4]


@pytest.mark.parametrize("text", ["<s> one", "<s>one"])
def test_a_bos_that_the_text_brings_is_not_doubled(text, bos_tokenizer):
    assert prompt_ids(bos_tokenizer, text)[:2].count(0) == 1
    bos_tokenizer.chat_template = BOS_TEMPLATE
    assert prompt_ids(bos_tokenizer, "<s> one").count(0) <= 2  # of the template, and as part of the message
    assert prompt_ids(bos_tokenizer, "<s> one")[:2] != [0, 0]


# System prompts

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}<model>"
)
IGNORES_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% endif %}{% endfor %}<model>"
)
TAKES_SYSTEM = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}{% endfor %}<model>"


def rendered(tokenizer, template, turns):
    tokenizer.chat_template = template
    return render(tokenizer, turns)


SYSTEM, USER = {"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "two"}


def test_a_system_message_goes_where_the_template_puts_it(bos_tokenizer):
    assert rendered(bos_tokenizer, TAKES_SYSTEM, [SYSTEM, USER]) == "<system>Be brief.<user>two<model>"


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, IGNORES_SYSTEM])
def test_a_template_without_a_system_role_gets_it_before_the_first_user_message(template, bos_tokenizer):
    expected = "<user> Be brief.\n\n\ntwo<model>"
    assert rendered(bos_tokenizer, template, [SYSTEM, USER]) == expected
    later = [SYSTEM, USER, {"role": "assistant", "content": "2"}, USER]
    assert rendered(bos_tokenizer, template, later) == expected.replace("<model>", "<assistant>2<user>two<model>")


def test_a_system_prompt_is_a_first_message(tokenizer):
    by_keyword = prompt_ids(tokenizer, "hi", system="Be brief.")
    assert by_keyword == prompt_ids(
        tokenizer, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    )
    assert decode_ids(tokenizer, by_keyword) == "Be brief.hi"
    with pytest.raises(ConfigError, match="system message already"):
        prompt_ids(tokenizer, [SYSTEM, USER], system="Be brief.")


def test_without_a_template_a_system_prompt_is_text_before_the_message(bos_tokenizer):
    assert prompt_ids(bos_tokenizer, "two", system="one") == [0, 3, 4]


def test_what_a_template_refuses_is_one_line(bos_tokenizer):
    with pytest.raises(ModelError, match="refuses the roles system, assistant"):
        rendered(bos_tokenizer, REFUSES_SYSTEM, [SYSTEM, {"role": "assistant", "content": "2"}])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": b"hi"}],
        [{"content": "hi"}],
    ],
)
def test_what_are_no_messages_is_refused(messages, tokenizer):
    with pytest.raises(ConfigError, match="message"):
        prompt_ids(tokenizer, messages)


# Stop ids


@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"])
def test_what_ends_a_turn_of_the_chat_ends_a_sequence(token, bos_tokenizer):
    bos_tokenizer.add_special_tokens({"additional_special_tokens": [token, "<|other|>"]})
    ends = bos_tokenizer.convert_tokens_to_ids(token)
    assert stop_ids(bos_tokenizer, None) == {1}
    bos_tokenizer.chat_template = "{{ messages[0]['content'] }}" + token
    assert stop_ids(bos_tokenizer, [7]) == {1, 7, ends}


def test_an_end_of_turn_that_is_no_token_is_none(bos_tokenizer):
    bos_tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    assert stop_ids(bos_tokenizer, None) == {1}


@pytest.mark.parametrize(("eos", "expected"), [(None, {1}), (1, {1}), (7, {1, 7}), ([1, 7, 9], {1, 7, 9})])
def test_stop_ids_are_those_of_tokenizer_and_generation_config(eos, expected, bos_tokenizer):
    assert stop_ids(bos_tokenizer, eos) == expected


def test_a_tokenizer_without_an_eos_stops_at_the_configs(bos_tokenizer):
    bos_tokenizer.eos_token = None
    assert stop_ids(bos_tokenizer, 7) == {7}
    assert stop_ids(bos_tokenizer, None) == frozenset()
