"""Training a LoRA on a model in half precision: its products in that precision, its weights and gradients in float32."""

from __future__ import annotations

import pytest
import torch

from s2t.model.load import load_model
from s2t.model.lora import lora_parameters, new_lora, trained_in_half

IDS = torch.arange(20, 60)[None]


def gradients(dtype, is_half):
    model = load_model("tiny:slm", dtype).model
    torch.manual_seed(0)
    peft_model = new_lora(model, 4, 8.0, 0.0)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.requires_grad_(True)
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    inputs = []
    layer = model.get_decoder().layers[0].mlp.down_proj.lora_A["default"]
    layer.register_forward_hook(lambda module, args, output: inputs.append((args[0].dtype, output.dtype)))
    decoder = model.get_decoder()
    if is_half:
        with trained_in_half(model):
            hidden = decoder(input_ids=IDS, use_cache=False).last_hidden_state
    else:
        hidden = decoder(input_ids=IDS, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden).float()
    torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    parameters = lora_parameters(peft_model.get_base_model()).values()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in parameters)
    return torch.cat([parameter.grad.flatten() for parameter in parameters]), inputs[0]


def test_the_products_of_a_lora_run_in_the_models_precision_and_gradients_stay_those_of_float32():
    exact, _ = gradients("float32", False)
    wide, cast = gradients("bfloat16", False)
    half, kept = gradients("bfloat16", True)
    assert cast == (torch.float32, torch.float32) and kept == (torch.bfloat16, torch.bfloat16)
    for found in (wide, half):
        assert torch.nn.functional.cosine_similarity(exact, found, dim=0) > 0.98


def test_a_float32_model_trains_as_before():
    plain, _ = gradients("float32", False)
    same, _ = gradients("float32", True)
    assert torch.equal(plain, same)


def test_without_gradients_nothing_changes():
    model = load_model("tiny:slm", "bfloat16").model
    new_lora(model, 4, 8.0, 0.0)
    with torch.no_grad(), trained_in_half(model):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ZeroDivisionError), trained_in_half(model):
        raise ZeroDivisionError
    layer = model.get_decoder().layers[0].mlp.down_proj
    assert layer.cast_input_dtype_enabled
