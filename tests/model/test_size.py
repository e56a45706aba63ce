"""A lower bound of tokens from bytes alone: never more than the tokenizer writes, and enough to refuse a megabyte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from s2t.errors import ModelError
from s2t.model.chat import encode, prompt_ids
from s2t.model.load import load_model
from s2t.model.size import TooLong, check_size, least_tokens

TEXTS = [
    "Ava has 3 apples and buys 4 more. " * 9,
    "===== ===== " * 20,
    "日本語のテキスト " * 9,
    "aaaa" * 50,
    "    \n\n\t" * 30,
]


def trained(normalizer=None, cutter=None, byte_level=True):
    core = Tokenizer(models.BPE(byte_fallback=not byte_level, unk_token=None))
    core.normalizer = normalizer
    core.pre_tokenizer = cutter or (pre_tokenizers.ByteLevel(False) if byte_level else pre_tokenizers.Metaspace())
    core.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    fallback = [] if byte_level else [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>", *fallback])
    core.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def stripping():
    tokenizer = trained()
    tokenizer.add_tokens([AddedToken("<wide>", lstrip=True, rstrip=True)])
    return tokenizer


KEEPING = {
    "tiny": lambda: load_model("tiny:slm").tokenizer,
    "byte level": trained,
    "composed": lambda: trained(normalizers.NFC()),
    "compatible": lambda: trained(normalizers.NFKC()),
    "byte fallback": lambda: trained(byte_level=False),
    "marked spaces": lambda: trained(normalizers.Replace(" ", "▁"), byte_level=False),
    "isolated digits": lambda: trained(
        cutter=pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    ),
    "a token that swallows spaces": stripping,
}
LOSING = {
    "words": lambda: PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>"
    ),
    "cut at spaces": lambda: trained(
        cutter=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    ),
    "lower case": lambda: trained(normalizers.Lowercase()),
    "stripped": lambda: trained(normalizers.Strip()),
}
MADE = {name: make() for name, make in (KEEPING | LOSING).items()}


@pytest.mark.parametrize("name", KEEPING)
@given(
    text=st.one_of(
        st.text(max_size=300),
        st.lists(
            st.sampled_from([*TEXTS, " ", "\n", "a", "e\u0301", "\u1100\u1161", "ﬁ", "<s>", "<wide>", "   <wide>   "])
        ).map("".join),
    )
)
def test_the_bound_is_never_more_than_the_tokens(name, text):
    tokenizer = MADE[name]
    assert least_tokens(tokenizer, text) <= len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", KEEPING)
@pytest.mark.parametrize("unit", ["word ", "x", "日本", "= ", "12"])
def test_a_megabyte_has_many_tokens(name, unit):
    assert least_tokens(MADE[name], unit * (1_000_000 // len(unit.encode()))) > 2048


@pytest.mark.parametrize("name", LOSING)
def test_a_tokenizer_that_loses_text_gives_no_bound(name):
    assert least_tokens(MADE[name], "word " * 100_000) == 0


def test_what_cannot_fit_is_refused_and_what_can_is_not(monkeypatch):
    tokenizer = MADE["tiny"]
    fits = "Ava has 3 apples. " * 20
    size = len(encode(tokenizer, fits, False))
    check_size(tokenizer, fits, size)
    with pytest.raises(TooLong, match="at least") as raised:
        check_size(tokenizer, fits * 100, 50)
    assert 50 < raised.value.least <= 100 * size
    monkeypatch.setattr("s2t.model.chat.encode", lambda *_, **__: pytest.fail("it was tokenized"))
    with pytest.raises(TooLong):
        prompt_ids(tokenizer, fits * 100, max_tokens=50)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_a_lone_surrogate_is_one_line(text):
    with pytest.raises(ModelError, match="lone surrogate"):
        prompt_ids(MADE["tiny"], text)
    assert least_tokens(MADE["tiny"], text) <= 3
