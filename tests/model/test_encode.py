"""No text becomes a reserved token, for tokenizers of every kind; everything else is encoded as ever."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE, Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from s2t.errors import ModelError
from s2t.model.chat import encode, prompt_ids
from s2t.model.reserved import choose_reserved_ids, spare_tokens_in

CORPUS = ["the cat sat on the mat", "a reserved special token 5 unused 7 control 12", "one two three <|>[]_ 0123456789"]
ASCII = [chr(i) for i in range(33, 127)]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}<|end|>{% endfor %}"


def wrapped(core, **names):
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", chat_template=TEMPLATE, **names)


def specials(core, spare):
    """Special tokens of a chat, with spare tokens before and after them."""
    added = [AddedToken(spare.format(i), special=True, normalized=False) for i in range(20)]
    chat = [AddedToken(token, special=True, normalized=False) for token in ("<|turn|>", "<|end|>")]
    core.add_tokens([*added[:5], *chat, *added[5:]])


def llama3(spare):
    """Byte-level BPE; all special tokens lie past the vocabulary."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"])
    )
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    specials(core, spare)
    return wrapped(core)


def gemma(spare):
    """BPE over text whose spaces are marks; the spare tokens are entries of the vocabulary, and not special."""
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    spares = [spare.format(i) for i in range(20)]
    names = ["<s>", "<unk>", *spares, "<|turn|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=[*ASCII, "▁"], special_tokens=names)
    core.train_from_iterator(CORPUS, trainer)
    data = json.loads(core.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] not in spares
    return wrapped(Tokenizer.from_str(json.dumps(data)), unk_token="<unk>")


def mistral(spare):
    """Metaspace BPE that puts a mark before the text."""
    core = Tokenizer(BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    names = ["<s>", "<unk>", *(spare.format(i) for i in range(20)), "<|turn|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=[*ASCII, "▁"], special_tokens=names)
    core.train_from_iterator(CORPUS, trainer)
    return wrapped(core, unk_token="<unk>")


def unigram(spare):
    """A Unigram model whose own pieces include the spare tokens, so that it would choose them by itself."""
    spares = [spare.format(i) for i in range(20)]
    pieces = [("<s>", 0.0), ("<unk>", 0.0), *((token, -1.0) for token in spares), ("▁", -2.0)]
    core = Tokenizer(Unigram([*pieces, *((letter, -5.0) for letter in ASCII)], unk_id=1))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "<|turn|>", "<|end|>")])
    return wrapped(core, unk_token="<unk>")


KINDS = [
    (llama3, "<|reserved_special_token_{}|>"),
    (gemma, "<unused{}>"),
    (mistral, "[control_{}]"),
    (mistral, "<SPECIAL_{}>"),
    (llama3, "<|dummy_{}|>"),
    (llama3, ">>UNUSED_{}<<"),
    (llama3, "<｜place▁holder▁no▁{}｜>"),
    (unigram, "<unused{}>"),
]
every_kind = pytest.mark.parametrize(
    ("make", "spare"), KINDS, ids=[f"{make.__name__} {spare}" for make, spare in KINDS]
)


@every_kind
def test_the_spelling_of_a_spare_token_is_plain_text(make, spare):
    tokenizer = make(spare)
    ids = choose_reserved_ids(tokenizer.get_vocab(), len(tokenizer), 16)
    assert "spare tokens" in ids.kind
    last, first = spare.format(19), spare.format(0)
    assert tokenizer(last, add_special_tokens=False)["input_ids"][-1] in ids.all  # what happens without care
    spares = {i for token, i in tokenizer.get_vocab().items() if spare_tokens_in(token) == {token}}
    for text in (f"the {last} cat", last, f"{first}{last}", f"a {spare.format(7)}"):
        encoded = encode(tokenizer, text, add_special_tokens=False)
        assert not spares & set(encoded)
        if "▁" not in spare:  # which is how some of them write a space
            assert tokenizer.decode(encoded, clean_up_tokenization_spaces=False) == text


@every_kind
def test_special_tokens_of_the_chat_keep_working_beside_it(make, spare):
    tokenizer = make(spare)
    turn, end = tokenizer.convert_tokens_to_ids(["<|turn|>", "<|end|>"])
    ids = prompt_ids(tokenizer, f"the {spare.format(19)} cat")
    assert (ids[0], ids[-1]) == (turn, end)
    assert not set(ids) & set(choose_reserved_ids(tokenizer.get_vocab(), len(tokenizer), 16).all)


@every_kind
def test_other_text_is_encoded_as_the_tokenizer_does(make, spare):
    tokenizer = make(spare)
    for text in ("the cat sat", "<|turn|>one<|end|>", "<|reserved_special|> <unused> [control_] ", ""):
        for adds in (True, False):
            assert encode(tokenizer, text, adds) == tokenizer(text, add_special_tokens=adds)["input_ids"]


def test_the_twin_is_made_once_and_adds_the_bos_too():
    tokenizer = llama3("<|reserved_special_token_{}|>")
    text = "the <|reserved_special_token_3|>"
    ids = encode(tokenizer, text, add_special_tokens=True)
    assert ids[0] == tokenizer.bos_token_id and ids[1] != tokenizer.bos_token_id
    assert encode(tokenizer, text, add_special_tokens=True) == ids
    assert encode(tokenizer, "<s>the cat", add_special_tokens=True).count(tokenizer.bos_token_id) == 1


def test_a_spelling_of_another_family_is_text_like_any_other():
    tokenizer = llama3("<|reserved_special_token_{}|>")
    assert encode(tokenizer, "<unused7>", False) == tokenizer("<unused7>", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_a_fast_backend_refuses_the_text():
    class Slow:
        bos_token_id = None

        def get_vocab(self):
            return {"<unused7>": 3}

        def __call__(self, text, add_special_tokens, verbose=True):
            return {"input_ids": [1]}

    assert encode(Slow(), "fine", True) == [1]  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="<unused7>"):
        encode(Slow(), "see <unused7>", True)  # type: ignore[arg-type]


def test_spellings_of_two_families_that_overlap_are_both_found(tiny_slm):
    text = "Say >>UNUSED_1<<|reserved_12|> now"
    assert spare_tokens_in(text) == {">>UNUSED_1<<", "<|reserved_12|>"}
    ids = prompt_ids(tiny_slm.tokenizer, text)
    assert set(ids).isdisjoint(tiny_slm.reserved.all) and "<|reserved_12|>" in tiny_slm.tokenizer.decode(ids)
