"""Tokenizers as bytes, and the map between two vocabularies, on tokenizers of the usual kinds."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from s2t.errors import ModelError
from s2t.model.text import TextCodec, VocabularyMap, same_tokens

CORPUS = [
    "She has 21 apples and 7 pears, so 21 + 7 = 28.",
    "größer ÷ naïve – ¿qué? 東京 🙂",
    "x = 11; y = 110\nz\t= x\n",
] * 20


def byte_level(size=400, digits=True, special=("<|pad|>", "<|end|>")):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=digits), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=special[0], eos_token=special[1])


def pieces(kind):
    """Spaces as bars, bytes as <0x..>, a space put before every text: as Llama 2, Mistral and Gemma have it."""
    alphabet = sorted({char for text in CORPUS[:1] for char in text} | {"▁"})
    special = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(
            vocab_size=120, special_tokens=special, initial_alphabet=alphabet, limit_alphabet=len(alphabet)
        )
    else:
        core = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=90, special_tokens=special, initial_alphabet=alphabet, unk_token="<unk>"
        )
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.train_from_iterator(CORPUS[:1] * 20, trainer)
    data = json.loads(core.to_str())
    data["model"]["byte_fallback"] = True
    vocab = data["model"]["vocab"]
    for byte in (f"<0x{i:02X}>" for i in range(256)):
        if kind == "bpe":
            vocab[byte] = len(vocab)
        else:
            vocab.append([byte, -20.0])
    core = Tokenizer.from_str(json.dumps(data))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


KINDS = {
    "byte-level digits": byte_level,
    "byte-level numbers": lambda: byte_level(digits=False),
    "pieces, BPE": lambda: pieces("bpe"),
    "pieces, Unigram": lambda: pieces("unigram"),
}


@pytest.fixture(scope="module", params=list(KINDS))
def codec(request):
    return TextCodec(KINDS[request.param]())


TEXTS = ["21 + 7 = 28", " apples", "apples", " 21", "21", "\n", "a\tb", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_encoded_joins_to_the_text(codec, text):
    [ids] = codec.encode([text.encode()])
    assert codec.join(ids).decode() == text


@given(st.binary(max_size=12))
def test_any_bytes_survive_a_byte_level_tokenizer(data):
    codec = CODEC
    [ids] = codec.encode([data])
    assert codec.join(ids) == data


CODEC = TextCodec(byte_level())


def test_no_space_is_put_before_a_text_that_has_none():
    codec = TextCodec(pieces("bpe"))
    inner, outer = codec.encode([b"apples", b" apples"])
    assert codec.join(inner) == b"apples"
    assert codec.join(outer) == b" apples"
    assert inner != outer


def test_a_tokens_own_bytes_are_that_token(codec):
    own = [(i, data) for i, data in enumerate(codec.bytes_of) if data and codec.id_of[data] == i]
    assert len(own) > 200
    assert codec.first([data for _, data in own]) == [i for i, _ in own]


def test_half_a_character_is_cut_into_its_bytes():
    half = "a東".encode()[:-1]
    [ids] = CODEC.encode([half])
    assert CODEC.join(ids) == half
    assert CODEC.first([half[1:]]) == [CODEC.id_of[half[1:2]]] or CODEC.id_of.get(half[1:])


def test_special_tokens_have_no_bytes_and_their_names_are_plain_text():
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>", special=True)]})
    codec = TextCodec(tokenizer, reserved=[300])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert codec.bytes_of[turn] is None
    assert codec.bytes_of[0] is None
    assert codec.bytes_of[300] is None
    [ids] = codec.encode([b"<|turn|>"])
    assert turn not in ids
    assert codec.join(ids) == b"<|turn|>"


def test_a_slow_tokenizer_is_one_clear_line():
    class Slow:
        pass

    with pytest.raises(ModelError, match="slow tokenizer"):
        TextCodec(Slow())  # type: ignore[arg-type]


# Two vocabularies


@pytest.fixture(scope="module")
def mapped(random_model):
    """An SLM whose numbers are whole, and an LLM that writes digit by digit."""
    return VocabularyMap(of(random_model, byte_level(digits=False)), of(random_model, byte_level(380), seed=1))


def of(random_model, tokenizer, seed=0):
    from s2t.model.load import wrap_model

    size = len(tokenizer)
    model = random_model("qwen2", seed, vocab_size=size + 20).model
    return wrap_model(f"model-{seed}", model, tokenizer)


def test_every_token_goes_to_the_token_its_text_begins_with(mapped):
    slm, llm, first = mapped.slm_codec, mapped.llm_codec, mapped.first_ids.tolist()
    for i, data in enumerate(llm.bytes_of[: len(first)]):
        if data and i not in mapped.llm.stop_ids:
            target = slm.bytes_of[first[i]]
            assert target and (data.startswith(target) or target.startswith(data))


def test_stop_ids_go_to_the_stop_id_and_other_special_tokens_nowhere(mapped):
    first = mapped.first_ids.tolist()
    assert first[mapped.llm.tokenizer.eos_token_id] == mapped.slm.tokenizer.eos_token_id
    assert first[mapped.llm.tokenizer.pad_token_id] == mapped.slm.vocab_size


def test_projecting_keeps_all_mass(mapped):
    probs = torch.rand(3, mapped.llm.vocab_size).softmax(-1)
    projected = mapped.project(probs)
    assert projected.shape == (3, mapped.slm.vocab_size + 1)
    torch.testing.assert_close(projected.sum(-1), torch.ones(3))


def test_a_model_maps_to_itself(random_model):
    loaded = of(random_model, byte_level())
    vocabulary = VocabularyMap(loaded, loaded)
    first = vocabulary.first_ids.tolist()
    moved = [i for i, target in enumerate(first) if target != i and vocabulary.llm_codec.bytes_of[i] is not None]
    assert not moved
    assert same_tokens(loaded, loaded)
    assert not same_tokens(loaded, of(random_model, byte_level(digits=False)))


def test_the_embedded_pair_shares_its_tokens_and_padding_rows_do_not_matter(tiny_slm, tiny_llm, random_model):
    assert same_tokens(tiny_slm, tiny_llm)
    assert same_tokens(random_model(), random_model(vocab_size=1100))
