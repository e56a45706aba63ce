"""Wrong weights never pass for right ones: a checkpoint that lacks, mistypes or reshapes anything is refused in one line."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from s2t.cli.main import main
from s2t.errors import ModelError
from s2t.model.checkpoint import kind_faults
from s2t.model.load import load_model, load_without_weights

IDS = torch.tensor([[5, 6, 7, 200, 31]])


def refusal(folder):
    with pytest.raises(ModelError) as raised:
        load_model(str(folder))
    line = str(raised.value)
    assert len(line.splitlines()) == 1 and str(folder) in line
    return line


@pytest.fixture(scope="module")
def saved(random_model, tmp_path_factory):
    """A checkpoint with an output embedding of its own."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    loaded = random_model(tie_word_embeddings=False)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def reconfigure(folder, file="config.json", **values):
    settings = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(settings))


CHANGES = {
    "removed": lambda tensor: None,
    "int64": lambda tensor: tensor.to(torch.int64),
    "int8": lambda tensor: (100 * tensor).to(torch.int8),
    "bool": lambda tensor: tensor > 0,
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "a row less": lambda tensor: tensor[:-1],
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "another dimension": lambda tensor: tensor[None],
    "flat": lambda tensor: tensor.reshape(-1, 1) if tensor.ndim == 1 else tensor.flatten(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_removing_retyping_or_reshaping_any_one_tensor_is_refused(change, saved, copy):
    whole = load_file(saved / "model.safetensors")
    for name, tensor in whole.items():
        changed = CHANGES[change](tensor)
        others = {key: value for key, value in whole.items() if key != name}
        found = others if changed is None else others | {name: changed.contiguous()}
        save_file(found, copy / "model.safetensors", {"format": "pt"})
        assert name in refusal(copy)


def test_a_tensor_under_another_name_is_refused(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.norm.weigth": tensors.pop("model.norm.weight")}))
    assert "model.norm.weight is missing" in refusal(copy)


def test_a_shard_that_is_not_named_is_missed(random_model, tmp_path):
    loaded = random_model()
    loaded.model.save_pretrained(tmp_path, max_shard_size="150KB")
    loaded.tokenizer.save_pretrained(tmp_path)
    load_model(str(tmp_path))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    lost = sorted(set(index["weight_map"].values()))[-1]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != lost}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is missing" in refusal(tmp_path)


def test_weights_of_layers_that_the_config_does_not_have_are_refused(copy):
    reconfigure(copy, num_hidden_layers=1, layer_types=["full_attention"])
    assert "model.layers.1." in refusal(copy)


def test_a_bias_that_the_model_would_leave_out_is_refused(copy):
    rewrite(copy, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(96)}))
    assert "up_proj.bias" in refusal(copy)


def test_a_head_of_another_task_may_lie_beside_the_weights(copy):
    rewrite(copy, lambda tensors: tensors.update({"v_head.summary.weight": torch.ones(1, 48)}))
    load_model(str(copy))


def test_one_layer_of_another_floating_kind_is_refused_and_one_kind_of_tensor_is_not(copy):
    def norms(tensors):
        tensors.update({name: value.double() for name, value in tensors.items() if "norm" in name})

    rewrite(copy, norms)
    load_model(str(copy))
    kinds = [(f"layers.{i}.up.weight", kind) for i, kind in enumerate(("BF16", "BF16", "F16"))]
    assert kind_faults(kinds) == ["layers.2.up.weight holds F16 numbers, and that of other layers BF16"]


def test_weights_that_are_not_numbers_are_found_when_they_are_loaded(copy, capsys):
    rewrite(copy, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    assert "not finite" in refusal(copy)
    assert main(["generate", "1 + 1?", "--slm", str(copy)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and not captured.out


# Configs


@pytest.mark.parametrize(
    "values",
    [
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "two"},
        {"num_hidden_layers": 3},
        {"hidden_size": "48"},
        {"hidden_size": 40},
        {"hidden_size": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": -4},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": None, "num_attention_heads": None},
        {"vocab_size": -1},
        {"vocab_size": 12},
        {"vocab_size": 10.5},
        {"hidden_act": "no_such_function"},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": -1e9},
        {"max_position_embeddings": -512},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": "many"},
        {"layer_types": ["full_attention"]},
        {"layer_types": ["no", "such"]},
        {"layer_types": 7},
        {"rope_parameters": {"rope_type": "no-such"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}},
        {"rope_parameters": "default"},
        {"model_type": 3},
        {"model_type": "no-such-model"},
        {"eos_token_id": "<|im_end|>"},
        {"eos_token_id": [1, "two"]},
        {"dtype": "float7"},
        {"use_sliding_window": True, "sliding_window": -3, "max_window_layers": 0},
    ],
    ids=str,
)
def test_a_config_with_a_field_that_is_wrong_is_one_line(values, copy):
    reconfigure(copy, **values)
    refusal(copy)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", '{"model_type": "qwen2"', "[" * 100_000, '{"vocab_size": ' + "9" * 5000 + "}"]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_file_that_is_no_json_of_its_kind_is_one_line(file, text, copy):
    (copy / file).write_text(text)
    refusal(copy)


def test_an_end_of_text_that_is_text_is_said_so(copy):
    reconfigure(copy, "generation_config.json", eos_token_id="<|im_end|>")
    assert "must be a token id, a whole number" in refusal(copy)


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "b" * 300, "/tmp/" + "c" * 300, "a\0b", "./" + "d/" * 3000])
@pytest.mark.parametrize("read", [load_model, load_without_weights])
def test_a_name_that_no_file_can_have_is_one_line(name, read):
    with pytest.raises(ModelError) as raised:
        read(name)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["qwen.gguf", "runs/x.GGUF", "owner/repo/x.gguf"])
def test_a_gguf_file_is_told_what_it_is(name, capsys):
    assert main(["generate", "Hi", "--slm", name]) == 2
    assert "GGUF file" in capsys.readouterr().err


def test_a_weights_file_is_answered_with_its_folder(copy):
    assert "pass the folder" in refusal(copy / "model.safetensors")


# Adapters on tied embeddings


TIED = {
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "both, tied": {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "a head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 31]},
    "neither": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.fixture
def tied(random_model, tmp_path):
    """A base with tied embeddings, and how to save an adapter of it that acts strongly; returns its logits and folder."""
    loaded = random_model(tie_word_embeddings=True)
    loaded.model.save_pretrained(tmp_path / "base")
    loaded.tokenizer.save_pretrained(tmp_path / "base")
    loaded.model.name_or_path = str(tmp_path / "base")

    @torch.no_grad()
    def save(**settings):
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
        adapted = peft.get_peft_model(loaded.model, config).eval()
        for name, parameter in adapted.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        adapted.save_pretrained(str(tmp_path / "adapter"))
        return adapted(input_ids=IDS).logits, tmp_path / "adapter"

    return save


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.filterwarnings("ignore")  # of PEFT, that tied embeddings are none of its business
def test_an_adapter_on_tied_embeddings_gives_the_logits_of_peft(kind, tied, tmp_path):
    expected, folder = tied(**TIED[kind])
    loaded = load_model(str(folder), dtype="float32")
    torch.testing.assert_close(loaded.model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    loaded.model.save_pretrained(tmp_path / "merged")  # and they stay so when it is saved
    loaded.tokenizer.save_pretrained(tmp_path / "merged")
    again = load_model(str(tmp_path / "merged")).model(input_ids=IDS).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["removed", "int64", "a row less", "flat"])
@pytest.mark.filterwarnings("ignore")  # as above
def test_changing_any_one_tensor_of_an_adapter_is_refused(change, tied):
    _, folder = tied(target_modules=["q_proj", "down_proj"])
    whole = load_file(folder / "adapter_model.safetensors")
    for name, tensor in whole.items():
        changed = CHANGES[change](tensor)
        others = {key: value for key, value in whole.items() if key != name}
        found = others if changed is None else others | {name: changed.contiguous()}
        save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
        refusal(folder)
