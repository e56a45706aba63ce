"""DoLa writes what the last transformers release that had it built in wrote, a prompt at a time; dola_release.json says how."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from s2t.decode.loop import Decoder
from s2t.files import read_json
from s2t.methods import contrast
from s2t.model.engine import Engine
from s2t.model.load import load_model, wrap_model
from s2t.records import Request

RELEASE = read_json(Path(__file__).with_name("dola_release.json"))


def random_model(slm):
    """Twelve layers, so that there are several to choose among."""
    torch.manual_seed(4)
    config = Qwen2Config(
        vocab_size=58,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return wrap_model("random-12", Qwen2ForCausalLM(config).float(), slm.tokenizer)


@pytest.mark.parametrize("part", ["high", "low"])
@pytest.mark.parametrize("name", ["embedded", "random"])
def test_dola_is_that_of_the_last_release_that_had_it(name, part, slm, strategy, monkeypatch):
    loaded = load_model("tiny:slm") if name == "embedded" else random_model(slm)
    monkeypatch.setattr(contrast.DoLa, "layers", part)
    engine = Engine(loaded, 1)
    engine.forbidden_ids = engine.forbidden_ids[:0]  # the release knew of no reserved ids
    for row in RELEASE[name]:
        decoder = Decoder(engine, strategy("dola"), max_new_tokens=max(len(row["high"]), len(row["low"]), 24))
        found = [step.token_id for step in decoder.run([Request(0, row["prompt_ids"])])]
        assert found[: len(row[part])] == row[part]
    assert len(engine.layers) == (3 if name == "random" else 1), (
        "of the random one's layers there are some to choose among"
    )
