"""The LLM read by text: its projection against every spelling one by one, and the exact path where tokens are shared."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from s2t.config import DecodeConfig
from s2t.decode.pair import Pair
from s2t.decode.text_reference import TextReference
from s2t.errors import ConfigError
from s2t.methods.strategies import build_strategy
from s2t.model.chat import decode_ids
from s2t.model.engine import Engine
from s2t.model.load import load_model, wrap_model
from s2t.model.text import VocabularyMap
from s2t.tasks.problems import load_task


def make(tokens, seed, merges=()):
    """A random model over single characters and a few longer tokens."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", *tokens])}
    core = Tokenizer(models.BPE(vocab, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocab) + 20,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.25,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return wrap_model(f"model-{seed}", Qwen2ForCausalLM(config), tokenizer)


CHARACTERS = list("0123=+Ġ")


@pytest.fixture(scope="module")
def numbers():
    """The SLM: 12, 13 and 123 are tokens of their own."""
    return make([*CHARACTERS, "12", "13", "123"], 0, [("1", "2"), ("1", "3"), ("12", "3")])


@pytest.fixture(scope="module")
def digits():
    """The LLM: one character, one token."""
    return make(CHARACTERS, 1)


def next_probs(loaded, ids):
    """By an uncached forward; [V]."""
    logits = loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1, : loaded.vocab_size]
    return logits.float().softmax(-1)


def brute_force(vocabulary, prompt, written, path=(), depth=3):
    """q over all strings of `depth` tokens of the LLM, each counted for the SLM's token that it begins with."""
    llm, size = vocabulary.llm, vocabulary.slm.vocab_size
    probs = next_probs(llm, [*prompt, *written, *path])
    q = torch.zeros(size + 1)
    for token, value in enumerate(probs.tolist()):
        text = vocabulary.llm_codec.join([*path, token])
        if vocabulary.llm_codec.bytes_of[token] is None:  # the text ends here
            nothing = vocabulary.stop_id if token in llm.stop_ids else size
            q[vocabulary.first([text])[0] if text else nothing] += value
        elif len(path) + 1 == depth:
            q[vocabulary.first([text])[0]] += value
        else:
            q += value * brute_force(vocabulary, prompt, written, (*path, token), depth)
    return q


@torch.no_grad()
@pytest.mark.parametrize("written", ["", "1=", "3+0 =", "=="])
def test_the_projection_sums_over_all_spellings(numbers, digits, written):
    vocabulary = VocabularyMap(numbers, digits)
    reference = TextReference(Engine(digits, 2), vocabulary)
    prompt = [2, 5, 6, 4]
    own = numbers.tokenizer(written)["input_ids"]
    reference.start(0, prompt)
    reference.settle(0, own, own)
    slm_logits = torch.zeros(1, numbers.vocab_size)  # every token is wanted
    found = reference.logits([(0, 0)], {0: [2]}, slm_logits, torch.tensor([], dtype=torch.long))
    expected = brute_force(vocabulary, prompt, digits.tokenizer(written)["input_ids"])
    assert expected[numbers.vocab_size] < 0.5
    torch.testing.assert_close(found.exp()[0], expected[: numbers.vocab_size], rtol=1e-3, atol=2e-4)
    texts = [numbers.tokenizer.convert_ids_to_tokens(int(i)) for i in found[0].topk(11).indices]
    assert {"12", "123"} <= set(texts)


@torch.no_grad()
def test_text_that_the_llm_would_cut_otherwise_is_stepped_back_over(numbers, digits):
    """Roles turned round: the SLM wrote 1, and the LLM knows 12 and 13 as one token each."""
    vocabulary = VocabularyMap(digits, numbers)
    reference = TextReference(Engine(numbers, 1), vocabulary)
    prompt = [2, 5, 6]
    equals, one = digits.tokenizer("=1")["input_ids"]
    reference.start(0, prompt)
    reference.settle(0, [equals, one], [equals, one])
    none = torch.tensor([], dtype=torch.long)
    found = reference.logits([(0, 0)], {0: [2]}, torch.zeros(1, digits.vocab_size), none).exp()[0]
    context = [*prompt, *numbers.tokenizer("=")["input_ids"]]
    before = next_probs(numbers, context)
    behind = next_probs(numbers, [*context, numbers.tokenizer("1")["input_ids"][0]])
    token = {text: numbers.tokenizer.convert_tokens_to_ids(text) for text in ("1", "2", "12", "123", "+")}
    digit = {text: digits.tokenizer.convert_tokens_to_ids(text) for text in ("2", "+")}
    two = before[token["12"]] + before[token["123"]] + before[token["1"]] * behind[token["2"]]
    plus = before[token["1"]] * behind[token["+"]]
    torch.testing.assert_close(found[digit["2"]] / found[digit["+"]], two / plus, rtol=1e-3, atol=0)


@pytest.fixture(scope="module")
def pairs():
    """The embedded pair, read by token and read by text."""
    slm, llm = load_model("tiny:slm"), load_model("tiny:llm")
    by_text = Pair(slm, llm)
    by_text.vocabulary = VocabularyMap(slm, llm)
    by_token = Pair(slm, llm)
    assert by_token.vocabulary is None
    return by_token, by_text


@pytest.fixture(scope="module")
def questions():
    return [p.question for p in load_task("rg:gsm_symbolic,max_number=100").problems("calibration", 8, 0)]


@pytest.mark.parametrize("name", ["s2t", "takeover"])
def test_a_pair_of_one_tokenizer_writes_the_same_by_text(pairs, questions, name):
    strategy = build_strategy(name, DecodeConfig(threshold=0.3), {})
    written = []
    for pair in pairs:
        requests = [pair.request(i, text) for i, text in enumerate(questions)]
        written.append([(s.token_ids, s.num_flips) for s in pair.write(strategy, requests, 160)])
    assert written[0] == written[1]
    assert any(flips for _, flips in written[0])


def test_a_pair_of_one_tokenizer_is_labelled_the_same_by_text(pairs, questions):
    greedy = build_strategy("greedy", DecodeConfig(), {})
    found = []
    for pair in pairs:
        requests = [pair.request(i, text) for i, text in enumerate(questions)]
        found.append(pair.label(requests, [s.token_ids for s in pair.write(greedy, requests, 160)]))
    for by_token, by_text in zip(*found, strict=True):
        assert (by_token.rank == by_text.rank).all()
        torch.testing.assert_close(by_text.divergence, by_token.divergence, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(by_text.llm_probs, by_token.llm_probs, rtol=1e-3, atol=1e-4)


def test_rows_read_by_text_come_and_go_as_single_sequences(numbers, digits):
    strategy = build_strategy("s2t", DecodeConfig(threshold=0.2), {})
    texts = ["12+3=", "0=", "1+1", "3+3+3 =", "2"]

    def write(batch_size):
        pair = Pair(numbers, digits, batch_size=batch_size)
        requests = [pair.request(i, text) for i, text in enumerate(texts)]
        return [(s.token_ids, s.cost) for s in pair.write(strategy, requests, 20)]

    assert write(1) == write(2) == write(5)


def test_the_llm_alone_reads_its_own_prompt_and_writes_its_own_tokens(numbers, digits):
    pair = Pair(numbers, digits)
    [done] = pair.write(build_strategy("llm", DecodeConfig(), {}), [pair.request(0, "12+3=")], 8)
    alone = Pair(digits)
    [expected] = alone.write(build_strategy("greedy", DecodeConfig(), {}), [alone.request(0, "12+3=")], 8)
    assert done.token_ids == expected.token_ids
    assert pair.tokenizer_of("llm") is digits.tokenizer


def test_drafts_of_a_fixed_length_need_one_tokenizer(numbers, digits):
    pair = Pair(numbers, digits)
    with pytest.raises(ConfigError, match="different tokenizers"):
        pair.write(build_strategy("s2t", DecodeConfig(threshold=0.2, draft_tokens=4), {}), [pair.request(0, "1")], 4)


def test_s2t_mends_an_slm_with_another_tokenizer():
    """tiny:slm-numbers writes a number as one token, tiny:llm digit by digit."""
    pair = Pair(load_model("tiny:slm-numbers"), load_model("tiny:llm"))
    task = load_task("rg:gsm_symbolic,max_number=100")
    problems = task.problems("calibration", 40, 0)
    requests = [pair.request(i, problem.question) for i, problem in enumerate(problems)]

    def correct(name):
        strategy = build_strategy(name, DecodeConfig(threshold=0.01), {})
        done = pair.write(strategy, requests, 200)
        texts = [decode_ids(pair.tokenizer_of(name), s.token_ids) for s in done]
        return sum(task.grade(problem, text).is_correct for problem, text in zip(problems, texts, strict=True))

    right = {name: correct(name) for name in ("greedy", "s2t", "llm")}
    assert right["greedy"] + 10 <= right["s2t"] <= right["llm"] + 2
