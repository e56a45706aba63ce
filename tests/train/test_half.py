"""Training a LoRA on a model in half precision: its products in that precision, its weights and gradients in float32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2t.model.half_lora import _kept, are_plain
from s2t.model.load import load_model
from s2t.model.lora import lora_parameters, new_lora, trained_in_half, tuner_layers

IDS = torch.arange(20, 60)[None]


class Seen(TorchDispatchMode):
    """Notes the dtypes of matrix products in which a side is as small as the LoRA's rank."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_") and any(4 in value.shape for value in tensors):
            self.dtypes |= {value.dtype for value in tensors}
        return func(*args, **(kwargs or {}))


def gradients(dtype, is_half, is_plain=True):
    model = load_model("tiny:slm", dtype).model
    torch.manual_seed(0)
    peft_model = new_lora(model, 4, 8.0, 0.0)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            parameter.requires_grad_(True)
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    if not is_plain:  # one layer that is not: PEFT runs all of them
        model.get_decoder().layers[0].mlp.down_proj.lora_bias["default"] = True
    decoder = model.get_decoder()
    with Seen() as seen:
        if is_half:
            with trained_in_half(model):
                hidden = decoder(input_ids=IDS, use_cache=False).last_hidden_state
        else:
            hidden = decoder(input_ids=IDS, use_cache=False).last_hidden_state
        logits = model.get_output_embeddings()(hidden).float()
        torch.nn.functional.cross_entropy(logits[0, :-1], IDS[0, 1:]).backward()
    parameters = lora_parameters(peft_model.get_base_model()).values()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in parameters)
    return torch.cat([parameter.grad.flatten() for parameter in parameters]), seen.dtypes


def test_the_products_of_a_lora_run_in_the_models_precision_and_gradients_stay_those_of_float32():
    exact, _ = gradients("float32", False)
    wide, cast = gradients("bfloat16", False)
    half, kept = gradients("bfloat16", True)
    peft, kept_by_peft = gradients("bfloat16", True, is_plain=False)
    assert cast == {torch.float32} and kept == kept_by_peft == {torch.bfloat16}
    for found in (wide, half, peft):
        assert torch.nn.functional.cosine_similarity(exact, found, dim=0) > 0.98
    assert torch.nn.functional.cosine_similarity(half, peft, dim=0) > 0.99


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
    assert layer.cast_input_dtype_enabled and "forward" not in layer.__dict__


def test_a_layer_that_is_switched_off_stays_so():
    model = load_model("tiny:slm", "bfloat16").model
    new_lora(model, 4, 8.0, 0.0)
    off = model.get_decoder().layers[0].mlp.down_proj
    off.forward = off.base_layer.__call__
    own = off.forward
    with trained_in_half(model):
        assert off.forward is own
    assert off.forward is own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])
def test_dropout_keeps_the_mean_and_drops_the_wanted_share(dtype, p):
    torch.manual_seed(0)
    hidden = torch.empty(999, 101, dtype=dtype)
    kept, again = _kept(hidden, p), _kept(hidden, p)
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert kept.shape == hidden.shape and kept.dtype == dtype
    assert torch.equal(kept.unique(), torch.stack([torch.zeros_like(scale), scale]))
    share = float((kept == 0).double().mean())
    assert share == pytest.approx(p, abs=4 * (p * (1 - p) / hidden.numel()) ** 0.5 + 2**-15)
    both = float(((kept == 0) & (again == 0)).double().mean())
    assert both == pytest.approx(p * p, abs=0.004)  # draws are independent
    torch.manual_seed(0)
    assert torch.equal(_kept(hidden, p), kept)


def test_gradients_under_dropout_are_those_of_the_same_numbers_dropped():
    model = load_model("tiny:slm", "bfloat16").model
    torch.manual_seed(0)
    new_lora(model, 4, 8.0, 0.5)
    layers = tuner_layers(model)
    assert are_plain(layers)
    layer = layers[0]
    layer.train()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.normal_(0.0, 0.1)
    hidden = torch.randn(2, 30, down.shape[1], dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(1)
    with trained_in_half(model, layers):
        output = layer(hidden)
    found = torch.autograd.grad(output.float().square().sum(), [hidden, down, up])
    torch.manual_seed(1)
    read = hidden * _kept(hidden, 0.5)
    own = layer.base_layer(hidden).float() + 2.0 * ((read.float() @ down.T) @ up.T)
    torch.testing.assert_close(output.float(), own, rtol=0.02, atol=0.02)
    wanted = torch.autograd.grad(own.square().sum(), [hidden, down, up])
    for left, right in zip(found, wanted, strict=True):
        assert torch.nn.functional.cosine_similarity(left.flatten().float(), right.flatten().float(), dim=0) > 0.999
