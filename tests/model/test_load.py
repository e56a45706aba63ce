"""Loading: every failure is one line that says what to do, and a model's identity is that of its weights."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from s2t.errors import ModelError
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import fingerprint, load_model, pick_device, wrap_model


def refusal(function, *args):
    """The message of the ModelError that the call must raise."""
    with pytest.raises(ModelError) as raised:
        function(*args)
    line = str(raised.value)
    assert len(line.splitlines()) == 1
    return line


def word_tokenizer(words):
    """A tokenizer with these words, from a dict of ids or a list."""
    vocab = words if isinstance(words, dict) else {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token=next(iter(vocab)))))


# Failures


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model", "./no/such/folder", "tiny:no"])
def test_a_missing_model_is_named(name):
    assert name in refusal(load_model, name)


def test_an_unknown_embedded_model_is_answered_with_the_known_ones():
    assert "tiny:llm" in refusal(load_model, "tiny:huge")


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert str(tmp_path) in refusal(load_model, str(tmp_path))


def test_weights_that_are_not_safetensors_are_not_loaded(random_model, tmp_path):
    loaded = random_model()
    loaded.model.config.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    torch.save(loaded.model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "no safetensors weights" in refusal(load_model, str(tmp_path))


def test_a_model_with_code_of_its_own_asks_for_trust(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": code}))
    (tmp_path / "own.py").write_text("raise SystemExit('this code must not run')")
    assert "--trust-remote-code" in refusal(load_model, str(tmp_path))


def test_a_damaged_checkpoint_is_refused(random_model, tmp_path):
    loaded = random_model()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert str(tmp_path) in refusal(load_model, str(tmp_path))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xla"])
def test_a_device_this_torch_does_not_have_is_refused(device):
    assert device in refusal(pick_device, device)


def test_auto_is_a_device_there_is():
    assert pick_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


# Loading


def test_a_saved_model_is_loaded_in_the_dtype_asked_for(random_model, tmp_path):
    saved = random_model("llama")
    saved.model.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = load_model(str(tmp_path), dtype, "cpu")
        assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
        assert not loaded.model.training
        logits = loaded.model(torch.tensor([[5, 6, 7]])).logits
        expected = saved.model(torch.tensor([[5, 6, 7]])).logits
        assert (logits.float() - expected).abs().mean() < 0.05 * expected.std()


def test_the_stop_ids_are_those_of_tokenizer_and_generation_config(random_model):
    loaded = random_model(eos_token_id=[1, 77])
    loaded.model.generation_config.eos_token_id = [1, 77]
    assert wrap_model("x", loaded.model, loaded.tokenizer).stop_ids == {1, 77}


def test_the_vocabulary_reaches_to_the_last_token_even_past_a_gap(random_model):
    loaded = random_model(vocab_size=64)
    words = {"a": 0, "b": 1, "end": 40}
    assert wrap_model("x", loaded.model, word_tokenizer(words)).vocab_size == 41


def test_loading_says_nothing(capfd):
    load_model("tiny:slm")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


# Pairs


# Fingerprints


def test_the_fingerprint_is_the_same_for_every_dtype(random_model, tmp_path):
    saved = random_model()
    saved.model.save_pretrained(tmp_path)
    saved.tokenizer.save_pretrained(tmp_path)
    prints = {load_model(str(tmp_path), d, "cpu").fingerprint for d in ("auto", "float32", "bfloat16", "float16")}
    assert prints == {saved.fingerprint}


def test_other_weights_have_another_fingerprint(random_model, tiny_slm, tiny_llm):
    loaded = random_model()
    assert loaded.fingerprint == random_model().fingerprint
    assert loaded.fingerprint != random_model(seed=1).fingerprint
    assert loaded.fingerprint != random_model("llama").fingerprint
    assert tiny_slm.fingerprint != tiny_llm.fingerprint


def test_a_fine_tuned_copy_has_another_fingerprint(random_model):
    loaded = random_model()
    before = fingerprint(loaded.model)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.mul_(1.02)
    assert fingerprint(loaded.model) != before


@pytest.mark.parametrize("scope", ["candidates", "always"])
def test_an_attached_adapter_leaves_the_fingerprint(random_model, scope):
    loaded = random_model()
    before, num_params = fingerprint(loaded.model), loaded.num_params
    SelectorAdapter(loaded, AdapterConfig("x", before, scope=scope))
    assert fingerprint(loaded.model) == before
    assert wrap_model("x", loaded.model, loaded.tokenizer).num_params == num_params
