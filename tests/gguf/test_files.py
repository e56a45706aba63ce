"""GGUF files without llama.cpp: what a header says, and the same model again when torch unpacks it."""

from __future__ import annotations

import struct

import pytest
import torch

from s2t.cli.main import main
from s2t.errors import ModelError
from s2t.model.gguf.file import gguf_path, read_header
from s2t.model.gguf.lora import write_lora
from s2t.model.gguf.tokenizer import load_tokenizer, name_of_pre_tokenizer
from s2t.model.load import load_model, load_without_weights
from s2t.model.outline import load_outline

pytest.importorskip("gguf", reason="gguf is not installed: pip install s2t[dev]")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install s2t[dev]")

TEXTS = ("What is 12 * 13?", "don't stop\n\n\tnow", "naïve 日本語 😀", "x" * 300, "<|user|>hi<|end|>")


def logits_of(loaded, ids):
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([ids])).logits.float()


def test_a_header_says_what_the_model_is(gguf_file, tiny_slm):
    header = read_header(gguf_file())
    assert (header.architecture, header.quantization, header.dtype) == ("qwen2", "float32", "float32")
    assert header.num_params == tiny_slm.num_params
    assert header.context_length == tiny_slm.context_length
    config = tiny_slm.model.config
    assert header.cached_values == 2 * config.num_hidden_layers * config.hidden_size
    assert header.num_bytes > 4 * header.num_params


@pytest.mark.parametrize("name", ["tiny:slm", "tiny:slm-numbers", "tiny:llm"])
def test_a_gguf_file_holds_tokenizer_and_template(name, gguf_file):
    loaded = load_model(name)
    tokenizer = load_tokenizer(read_header(gguf_file(name)))
    for text in TEXTS:
        assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert tokenizer.chat_template == loaded.tokenizer.chat_template
    assert tokenizer.eos_token_id == loaded.tokenizer.eos_token_id
    assert tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_a_tokenizer_that_llama_cpp_does_not_know_travels_whole(gguf_file):
    numbers = load_model("tiny:slm-numbers")
    assert name_of_pre_tokenizer(numbers.tokenizer.backend_tokenizer) is None
    assert "tokenizer.huggingface.json" in read_header(gguf_file("tiny:slm-numbers")).fields
    assert "tokenizer.huggingface.json" not in read_header(gguf_file("tiny:slm")).fields


def test_the_embedded_tokenizer_adds_no_token_past_the_vocabulary(tokenizer):
    assert max(tokenizer.get_vocab().values()) == 1023


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_torch_unpacks_the_very_model(family, random_model, gguf_file):
    made = random_model(family, num_key_value_heads=2)
    loaded = load_model(str(gguf_file(made)))
    ids = [5, 60, 70, 80, 90, 7]
    torch.testing.assert_close(logits_of(loaded, ids), logits_of(made, ids), rtol=1e-4, atol=1e-4)
    assert loaded.model.dtype == torch.float32
    assert loaded.vocab_size == made.vocab_size


def test_an_adapter_of_the_folder_fits_the_file(gguf_file, tiny_slm, save_adapter):
    from s2t.model.adapter import load_adapter

    loaded = load_model(str(gguf_file()))
    assert loaded.fingerprint == tiny_slm.fingerprint
    assert (loaded.stop_ids, loaded.reserved) == (tiny_slm.stop_ids, tiny_slm.reserved)
    load_adapter(save_adapter(), loaded)


def test_what_is_known_without_weights(gguf_file, tiny_slm):
    path = str(gguf_file())
    outline, bare = load_outline(path), load_without_weights(path)
    assert outline.num_params == bare.num_params == tiny_slm.num_params
    assert outline.stop_ids == bare.stop_ids == tiny_slm.stop_ids
    assert outline.flops is not None
    assert outline.flops(3, 10.0) == load_outline("tiny:slm").flops(3, 10.0)


def test_generate_runs_a_gguf_file_on_torch(gguf_file, capsys):
    words = ["--max-new-tokens", "12", "--strategy", "greedy", "What is 3 + 4?"]
    assert main(["generate", "--slm", str(gguf_file()), "--engine", "torch", *words]) == 0
    unpacked = capsys.readouterr().out
    assert main(["generate", "--slm", "tiny:slm", *words]) == 0
    assert unpacked == capsys.readouterr().out


def damaged(data: bytes, kind: str) -> bytes:
    return {
        "empty": b"",
        "text": b"this is no GGUF file at all, only text",
        "version": data[:4] + struct.pack("<I", 99) + data[8:],
        "cut": data[:200],
        "huge": data[:16] + struct.pack("<Q", 2**60) + data[24:],
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "version", "cut", "huge"])
def test_a_damaged_file_is_one_line(kind, gguf_file, tmp_path, capsys):
    path = tmp_path / "bad.gguf"
    path.write_bytes(damaged(gguf_file().read_bytes(), kind))
    assert main(["generate", "--slm", str(path), "hi"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("s2t: error")]
    assert len(lines) == 1 and str(path) in lines[0]


@pytest.mark.parametrize("name", ["hub:owner", "hub:owner/name", "hub:owner/name/model.bin.gguf/x", "hub:a/b/"])
def test_a_name_on_the_hub_has_three_parts(name):
    with pytest.raises(ModelError, match=r"hub:OWNER/NAME/FILE\.gguf"):
        gguf_path(name)


def test_a_packed_file_takes_no_quantization(gguf_file, capsys):
    assert (
        main(["generate", "--slm", str(gguf_file()), "--engine", "torch", "--quantization", "bitsandbytes-4bit", "x"])
        == 2
    )
    assert "is quantized already" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(gguf_file, save_adapter, random_model, tmp_path):
    other = random_model("qwen2")
    with pytest.raises(ModelError, match=r"another base model|does not have"):
        write_lora(save_adapter(other), read_header(gguf_file()), tmp_path / "lora.gguf")
