"""Loading: every failure is one line that says what to do, and a model's identity is that of its weights."""

from __future__ import annotations

import importlib.util
import json
import platform
import warnings

import peft
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from s2t.errors import ConfigError, ModelError
from s2t.model import load
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import check_on_one_device, load_model, pick_device, wrap_model
from s2t.model.loaded import fingerprint

IDS = torch.tensor([[5, 6, 7, 200, 31]])


def refusal(function, *args, **kwargs):
    """The message of the ModelError or ConfigError that the call must raise."""
    with pytest.raises((ModelError, ConfigError)) as raised:
        function(*args, **kwargs)
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


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("You are trying to access a gated repo. Make sure to have access to it at https://hf.co/a/b", "hf auth login"),
        ("main is not a valid git identifier (branch name, tag name or commit id) that exists", "no revision v9"),
        ("We couldn't connect to 'https://huggingface.co' to load the files", "hub cannot be reached"),
        (
            "a/b is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'",
            "a/b",
        ),
    ],
)
def test_what_the_hub_says_becomes_one_line_with_the_next_step(said, named, monkeypatch):
    def raise_it(*args, **kwargs):
        raise OSError(said)

    monkeypatch.setattr(load, "find_lora", raise_it)
    line = refusal(load_model, "a/b", revision="v9")
    assert named in line and "a/b" in line


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


# Adapters on a base


def save(loaded, folder):
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def base_folder(random_model, tmp_path):
    return save(random_model("llama"), tmp_path / "base")


def save_lora(base_folder, folder, base_name=None, **changes):
    """A LoRA that changes the model, saved by PEFT; returns the logits that PEFT itself computes with it."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings | changes)).eval()
        wrapped.peft_config["default"].base_model_name_or_path = base_name or str(base_folder)
        wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped(IDS).logits


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_a_lora_is_merged_into_its_base(changes, base_folder, tmp_path):
    expected = save_lora(base_folder, tmp_path / "lora", **changes)
    loaded = load_model(str(tmp_path / "lora"))
    assert type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name or "base_layer" in name for name, _ in loaded.model.named_parameters())
    torch.testing.assert_close(loaded.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded.fingerprint != load_model(base_folder).fingerprint
    SelectorAdapter(loaded, AdapterConfig("x", loaded.fingerprint))  # an ordinary model: a selector attaches to it


def test_a_merged_model_has_one_fingerprint_for_every_dtype(random_model, tmp_path):
    base = save(random_model("llama", dtype=torch.bfloat16), tmp_path / "base")
    save_lora(base, tmp_path / "lora")
    loaded = {dtype: load_model(str(tmp_path / "lora"), dtype) for dtype in ("auto", "float32", "bfloat16", "float16")}
    assert len({each.fingerprint for each in loaded.values()}) == 1
    assert loaded["auto"].model.dtype == torch.bfloat16
    assert loaded["float16"].model.dtype == torch.float16


def test_a_lora_may_sit_on_an_embedded_model_and_bring_its_own_tokenizer(tmp_path, tokenizer):
    from s2t.model.tiny import embedded_path

    save_lora(embedded_path("tiny:slm"), tmp_path / "lora", base_name="tiny:slm")
    own = AutoTokenizer.from_pretrained(str(embedded_path("tiny:slm")))
    own.add_tokens(["<new>"])
    own.save_pretrained(tmp_path / "lora")
    loaded = load_model(str(tmp_path / "lora"))
    assert loaded.vocab_size == len(tokenizer) + 1
    assert loaded.model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 1


def test_a_lora_whose_base_is_missing_names_it(base_folder, tmp_path):
    save_lora(base_folder, tmp_path / "lora", base_name="nobody/no-such-base")
    line = refusal(load_model, str(tmp_path / "lora"))
    assert "needs its base model" in line and "nobody/no-such-base" in line


def test_a_lora_that_is_pickled_or_damaged_is_refused(base_folder, tmp_path):
    save_lora(base_folder, tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "cannot be merged" in refusal(load_model, str(tmp_path / "lora"))
    weights.rename(tmp_path / "lora" / "adapter_model.bin")
    assert "adapter_model.safetensors" in refusal(load_model, str(tmp_path / "lora"))


def test_an_adapter_that_is_no_change_of_weights_is_refused(base_folder, tmp_path):
    save_lora(base_folder, tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    (tmp_path / "lora" / "adapter_config.json").write_text(
        json.dumps(config | {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4})
    )
    assert "cannot be merged" in refusal(load_model, str(tmp_path / "lora"))


def test_a_selector_adapter_is_no_model(base_folder, tmp_path):
    loaded = load_model(base_folder)
    SelectorAdapter(loaded, AdapterConfig(base_folder, loaded.fingerprint)).save(tmp_path / "selector")
    assert f"--slm {base_folder} --adapter" in refusal(load_model, str(tmp_path / "selector"))


def test_a_model_and_an_adapter_in_one_folder_are_told_apart(base_folder):
    save_lora(base_folder, base_folder)
    assert "a folder of its own" in refusal(load_model, base_folder)


# Device maps


@pytest.mark.parametrize("device_map", ["auto", "cpu", "sequential"])
def test_a_device_map_that_ends_on_one_device_is_as_good_as_a_device(device_map, base_folder):
    loaded = load_model(base_folder, device_map=device_map)
    torch.testing.assert_close(
        loaded.model(IDS.to(loaded.device)).logits.cpu(), load_model(base_folder).model(IDS).logits
    )


def test_device_and_device_map_exclude_each_other(base_folder):
    assert "pass one of them" in refusal(load_model, base_folder, device="cpu", device_map="auto")


def test_a_device_map_that_is_none_is_refused(base_folder):
    assert "somewhere" in refusal(load_model, base_folder, device_map="somewhere")


def test_a_model_spread_over_devices_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"))
    assert "cpu, meta" in refusal(check_on_one_device, "x", model)


# Quantization


def test_a_quantization_is_passed_on_as_transformers_own_config(base_folder, monkeypatch, tmp_path):
    seen = []

    def spy(source, **options):
        seen.append(options)
        raise OSError("seen enough")

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", spy)
    (tmp_path / "quant.json").write_text('{"quant_method": "quanto", "weights": "int4"}')
    for asked in ("bitsandbytes-4bit", '{"quant_method": "fp8"}', str(tmp_path / "quant.json")):
        refusal(load_model, base_folder, quantization=asked)
    four, fp8, quanto = [options["quantization_config"] for options in seen]
    assert (four.load_in_4bit, four.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert type(fp8).__name__ == "FineGrainedFP8Config"
    assert quanto.weights == "int4"
    assert all(options["device_map"] == {"": load.torch.device(pick_device("auto"))} for options in seen)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="needs bitsandbytes to be missing")
def test_a_quantization_without_its_package_says_how_to_install_it(base_folder):
    for asked in ("bitsandbytes-4bit", "bitsandbytes-8bit"):
        line = refusal(load_model, base_folder, quantization=asked)
        assert asked in line and "pip install -U 'bitsandbytes" in line


@pytest.mark.parametrize("asked", ["int3", '{"nbits": 3}', '{"quant_method": "magic"}', "{", "[1]"])
def test_a_quantization_nobody_knows_is_refused(asked, base_folder):
    assert asked[:8] in refusal(load_model, base_folder, quantization=asked)


def test_a_lora_is_not_merged_into_quantized_weights(base_folder, tmp_path):
    save_lora(base_folder, tmp_path / "lora")
    assert "quantized weights" in refusal(load_model, str(tmp_path / "lora"), quantization="bitsandbytes-4bit")


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


# Memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_memory_stays_with_the_process():
    import resource

    load_model("tiny:slm-small")

    def pages():
        parts = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(64)]
        for part in parts:
            part.fill_(1)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    pages()
    before = pages()
    assert pages() - before < 0.1 * 64 * 256  # of 4 KiB; all of them where freed memory goes back
