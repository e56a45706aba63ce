"""Adapters on disk: what is saved comes back, only the adapter is saved, and only its own base model takes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from s2t.errors import ModelError, S2TError
from s2t.files import read_json, write_json
from s2t.model.adapter import (
    ATTACHED,
    CONFIG_FILE,
    AdapterConfig,
    SelectorAdapter,
    load_adapter,
    read_adapter_config,
    selector_config,
    selector_problems,
)
from s2t.model.card import accuracy_section, with_accuracy
from s2t.model.engine import Engine
from s2t.model.load import load_model, wrap_model
from s2t.model.merged import problem_hashes
from s2t.model.plain_lora import PlainModel, attach_plain

torch.set_num_threads(1)

PROMPTS = [[40, 50, 60, 70], [41, 42], [99, 98, 97]]
SETTINGS = {
    "llm": "tiny:llm",
    "task": "rg:gsm_symbolic",
    "num_bins": 12,
    "head_size": 6,
    "lora_rank": 2,
    "lora_dropout": 0.0,
    "thresholds": {"criticality": 0.6},
    "split_hashes": {"train": "abc"},
    "heldout_templates": ("3", "7"),
    "versions": {"torch": "2"},
}


def make(criticality: str = "head", scope: str = "candidates") -> SelectorAdapter:
    """A random adapter on a fresh copy of the embedded small model."""
    loaded = load_model("tiny:slm", "float32")
    config = AdapterConfig("tiny:slm", loaded.fingerprint, scope=scope, criticality=criticality, **SETTINGS)
    torch.manual_seed(3)
    adapter = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.normal_(0.0, 0.2)
    adapter.selector.requires_grad_(False)
    return adapter


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random adapter and the folder it was saved to; tests that damage the folder copy it."""
    adapter = make()
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapter.save(folder, ("bbbb", "aaaa"))
    return adapter, folder


def readings(adapter):
    """Scores and criticality of the prompts."""
    engine = Engine(adapter.loaded, len(PROMPTS), adapter)
    rows = list(range(len(PROMPTS)))
    hidden = engine.extend(rows, PROMPTS)
    with torch.inference_mode():
        top = engine.logits(hidden).log_softmax(-1).topk(5)
        scores = adapter.scores(engine.branch(rows, top.indices), top.indices, top.values)
        return scores, adapter.criticality(hidden)


@pytest.mark.parametrize("criticality", ["head", "reserved"])
@pytest.mark.parametrize("scope", ["candidates", "always"])
def test_a_saved_adapter_reads_as_before(criticality, scope, tmp_path):
    adapter = make(criticality, scope)
    adapter.save(tmp_path / "adapter")
    again = load_adapter(tmp_path / "adapter", load_model("tiny:slm", "float32"))
    assert again.config == adapter.config
    for before, after in zip(readings(adapter), readings(again), strict=True):
        assert torch.equal(before, after)
    scores, critical = readings(again)
    assert scores.std() > 1e-3
    assert ((critical >= 0) & (critical <= 1)).all()


def test_only_the_lora_and_the_selector_are_saved(saved):
    adapter, folder = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors and all("lora_" in name for name in tensors)
    assert not any("embed_tokens" in name or "lm_head" in name for name in tensors)
    assert set(load_file(folder / "s2t_selector.safetensors")) == set(adapter.selector.state_dict())
    num_saved = sum(
        t.numel()
        for name in ("adapter_model", "s2t_selector")
        for t in load_file(folder / f"{name}.safetensors").values()
    )
    assert num_saved == sum(p.numel() for p in adapter.trainable().values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size < 0.5 * 4 * adapter.loaded.num_params
    assert {path.name for path in folder.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "s2t_selector.safetensors",
        "s2t_config.json",
        "train_problems.txt",
        "README.md",
    }


def test_the_folder_explains_itself(saved):
    adapter, folder = saved
    config = json.loads((folder / "s2t_config.json").read_text())
    assert config == json.loads(json.dumps(asdict(adapter.config)))
    assert {
        "base_model",
        "base_fingerprint",
        "scope",
        "num_bins",
        "thresholds",
        "split_hashes",
        "versions",
    } <= set(config)
    assert config["base_fingerprint"] == load_model("tiny:slm").fingerprint
    assert problem_hashes(folder) == {"aaaa", "bbbb"}
    card = (folder / "README.md").read_text()
    assert 'base_model: "tiny:slm"' in card and "| criticality | head |" in card and "## Training" not in card
    assert tuple(config["reserved_ids"]) == load_model("tiny:slm").reserved_for(12).all
    assert set(config["weights"]) == {"adapter_model.safetensors", "s2t_selector.safetensors"}


def test_the_card_of_readout_rank_has_its_weight_and_no_bins(tmp_path):
    loaded = load_model("tiny:slm", "float32")
    config = AdapterConfig("tiny:slm", loaded.fingerprint, readout="rank", scope="step", adapter_weight=0.0)
    SelectorAdapter(loaded, config).save(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "| readout | rank |" in card and "| adapter weight | 0 |" in card and "| warmup steps | 3 |" in card
    assert not any(word in card for word in ("num bins", "score temperature", "prior weight"))


def test_the_card_shows_what_training_measured(tmp_path):
    make().save(tmp_path / "adapter", training={"num_groups": 1200, "final_loss": 0.51234, "final": {"ce": 1.0}})
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "## Training" in card and "| num groups | 1200 |" in card and "| final loss | 0.5123 |" in card


FOUND = {
    "task": "gsm8k",
    "split": "test",
    "seed": 0,
    "strategies": {"s2t-local": {"accuracy": 0.638, "ci95": [0.608, 0.667], "num_problems": 1000}},
}


def test_accuracies_go_into_a_card_once_and_leave_the_rest(saved):
    card = (saved[1] / "README.md").read_text()
    with_one = with_accuracy(card, FOUND)
    assert "| s2t-local | 63.8 | 60.8 to 66.7 | 1000 |" in with_one and "gsm8k, split test, seed 0" in with_one
    assert with_one.index("## Accuracy") < with_one.index("## Settings")
    later = FOUND | {"seed": 1}
    assert with_accuracy(with_one, later) == with_accuracy(card, later)
    assert with_accuracy(with_one, later).count("## ") == card.count("## ") + 1
    assert with_one.replace(accuracy_section(FOUND), "") == card
    assert with_accuracy("my notes", FOUND) == f"my notes\n\n{accuracy_section(FOUND)}"


def test_an_adapter_that_does_not_act_leaves_the_base_bit_for_bit(saved):
    adapter, _ = saved
    plain = load_model("tiny:slm", "float32").model
    ids = torch.tensor([[40, 50, 60, 70, 80]])
    with torch.inference_mode():
        adapter.act(False)
        assert torch.equal(adapter.base_model(ids).logits, plain(ids).logits)
        adapter.act(True)
        assert not torch.allclose(adapter.base_model(ids).logits, plain(ids).logits, atol=1e-2)
        adapter.act(False)
        assert torch.equal(adapter.base_model(ids).logits, plain(ids).logits)


def test_an_engine_without_the_adapter_is_the_base_even_when_one_is_attached(saved):
    adapter, _ = saved
    assert adapter.loaded.model.__dict__.get(ATTACHED) is adapter
    plain = load_model("tiny:slm", "float32")
    assert plain.model.__dict__.get(ATTACHED) is None
    adapter.act(True)
    rows = list(range(len(PROMPTS)))
    left, right = (Engine(loaded, len(PROMPTS)).extend(rows, PROMPTS) for loaded in (adapter.loaded, plain))
    assert torch.equal(left, right)


def test_an_attached_adapter_does_not_change_the_fingerprint_or_the_size(saved):
    adapter, _ = saved
    plain = load_model("tiny:slm", "float32")
    adapted = replace(adapter.loaded)  # nothing cached
    assert adapted.fingerprint == plain.fingerprint
    assert adapted.num_params == plain.num_params


def test_another_base_model_is_refused(saved):
    _, folder = saved
    other = load_model("tiny:llm")
    with pytest.raises(ModelError, match=r"trained on tiny:slm .* not on tiny:llm .*; pass --slm tiny:slm") as caught:
        load_adapter(folder, other)
    assert "\n" not in str(caught.value)
    assert other.model.__dict__.get(ATTACHED) is None


def test_the_same_model_with_other_weights_is_refused(saved):
    _, folder = saved
    loaded = load_model("tiny:slm", "float32")
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.mul_(1.5)
    changed = wrap_model("tiny:slm", loaded.model, loaded.tokenizer)
    with pytest.raises(ModelError, match=r"was trained on tiny:slm .*revision and quantization"):
        load_adapter(folder, changed)


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def flip(name):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[-9] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def change_config(**changes):
    def damage(folder):
        config = json.loads((folder / "s2t_config.json").read_text()) | changes
        (folder / "s2t_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("s2t_config.json"), "no adapter folder: s2t_config.json is missing"),
        (without("s2t_selector.safetensors"), "is damaged"),
        (without("adapter_model.safetensors"), "is damaged"),
        (without("adapter_config.json"), "is damaged"),
        (cut("s2t_selector.safetensors"), "is damaged"),
        (cut("adapter_model.safetensors"), "is damaged"),
        (cut("adapter_config.json"), "is damaged"),
        (flip("s2t_selector.safetensors"), "s2t_selector.safetensors is not the file that was saved"),
        (flip("adapter_model.safetensors"), "adapter_model.safetensors is not the file that was saved"),
        (cut("s2t_config.json"), "is not JSON"),
        (change_config(num_bins=20), "is damaged"),
        (change_config(num_bins=20, weights=None), "is damaged"),  # one written before weights were hashed
        (change_config(from_the_future=1), "unknown keys from_the_future; it was written by a newer s2t"),
        (change_config(base_model=None), "is damaged.*base_model"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(damage, message, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "adapter"
    shutil.copytree(saved[1], folder)
    damage(folder)
    loaded = load_model("tiny:slm")
    modules = [name for name, _ in loaded.model.named_modules()]
    with pytest.raises(S2TError, match=message) as caught:
        load_adapter(folder, loaded)
    assert "\n" not in str(caught.value)
    assert [name for name, _ in loaded.model.named_modules()] == modules, "the base model is not as it was"


def test_an_adapter_from_before_weights_were_hashed_still_loads(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "adapter")
    change_config(weights=None)(folder)
    again = load_adapter(folder, load_model("tiny:slm", "float32"))
    assert again.config.weights == {}
    assert all(torch.equal(*pair) for pair in zip(readings(saved[0]), readings(again), strict=True))


def test_an_adapter_keeps_the_reserved_ids_it_was_saved_with(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "adapter")
    change_config(reserved_ids=list(range(900, 914)))(folder)
    again = load_adapter(folder, load_model("tiny:slm"))
    assert again.reserved.bins == tuple(range(900, 912)) and again.reserved.criticality == (912, 913)
    assert set(Engine(again.loaded, 1, again).forbidden_ids.tolist()) == set(range(900, 914))


def test_an_adapter_of_the_hub_is_found_by_its_id(saved, tmp_path, monkeypatch):
    place, commit = tmp_path / "models--somebody--adapter", "b" * 40
    shutil.copytree(saved[1], place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "somebody/adapter"
    again = load_adapter(name, load_model("tiny:slm", "float32"))
    assert all(torch.equal(*pair) for pair in zip(readings(saved[0]), readings(again), strict=True))
    assert selector_config(name, "tiny:slm") == again.config
    assert selector_problems(name, "tiny:slm") == {"aaaa", "bbbb"}
    with pytest.raises(ModelError, match=f"selector adapter, not a model; pass --slm tiny:slm --adapter {name}"):
        load_model(name)
    with pytest.raises(ModelError, match="adapter somebody/other does not exist"):
        load_adapter("somebody/other", load_model("tiny:slm"))


def test_pickled_weights_are_never_read(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "adapter"
    shutil.copytree(saved[1], folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="safetensors only"):
        load_adapter(folder, load_model("tiny:slm"))


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ModelError, match="is no adapter folder"):
        read_adapter_config(tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        read_adapter_config(tmp_path / "nothing")


def test_a_save_that_is_cut_short_is_no_adapter(tmp_path, monkeypatch):
    adapter = make()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("s2t.model.adapter.write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        adapter.save(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is no adapter folder"):
        read_adapter_config(tmp_path / "adapter")


# Beside ordinary tokens


@pytest.mark.parametrize("scope", ["candidates", "always"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_a_mixed_forward_the_adapter_acts_where_its_scope_says(scope, dtype, random_model):
    loaded = random_model("qwen2", dtype=dtype)
    adapter = SelectorAdapter(loaded, AdapterConfig(loaded.name, loaded.fingerprint, scope=scope))
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    prompts = [[3, 4, 5, 6], [30, 31, 32, 33, 34, 35]]

    def filled(max_rows):
        engine = Engine(loaded, max_rows, adapter)
        engine.extend(range(2), prompts)
        return engine

    hidden, branch = filled(3).step([0, 1, 2], [[20], [21], [22, 23]], [0, 1], ids)
    wide = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(branch, filled(2).branch([0, 1], ids), rtol=wide, atol=wide)
    apart = filled(3)
    apart = torch.cat([apart.extend([0, 1], [[20], [21]]), apart.extend([2], [[22, 23]])])
    torch.testing.assert_close(hidden, apart, rtol=wide, atol=wide)
    adapter.act(False)
    base = Engine(loaded, 2)
    base.extend(range(2), prompts)
    plain = base.branch([0, 1], ids)
    assert not torch.allclose(branch, plain, atol=0.2)
    assert torch.allclose(hidden[:2], base.extend([0, 1], [[20], [21]]), atol=wide) == (scope == "candidates")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scope", ["candidates", "always"])
def test_a_lora_without_peft_reads_bit_for_bit_as_with_it(scope, dtype, tmp_path):
    make("head", scope).save(tmp_path / "adapter")
    slm = load_model("tiny:slm", dtype)
    config = replace(read_adapter_config(tmp_path / "adapter"), base_fingerprint=slm.fingerprint)
    write_json(tmp_path / "adapter" / CONFIG_FILE, asdict(config))
    plain = load_adapter(tmp_path / "adapter", slm)
    with_peft = load_adapter(tmp_path / "adapter", load_model("tiny:slm", dtype), with_peft=True)
    assert isinstance(plain.peft_model, PlainModel) and not isinstance(with_peft.peft_model, PlainModel)
    assert {name: p.shape for name, p in plain.trainable().items()} == {
        name: p.shape for name, p in with_peft.trainable().items()
    }
    for ours, theirs in zip(readings(plain), readings(with_peft), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_no_plain_lora_is_left_to_peft(saved):
    folder = saved[1]
    config = read_json(folder / "adapter_config.json")
    model = load_model("tiny:slm").model
    for change in ({"use_dora": True}, {"rank_pattern": {"q_proj": 4}}, {"bias": "all"}, {"peft_type": "LOHA"}):
        write_json(folder / "adapter_config.json", config | change)
        assert attach_plain(model, folder) is None
    write_json(folder / "adapter_config.json", config)
    attached = attach_plain(model, folder)
    assert attached is not None and any("lora_A" in name for name, _ in model.named_parameters())
    attached.unload()
    assert not any("lora_" in name or "base_layer" in name for name, _ in model.named_parameters())


def test_inference_with_an_adapter_does_not_import_peft(saved):
    code = (
        "import sys, s2t\n"
        f"model = s2t.load('tiny:slm', adapter={str(saved[1])!r})\n"
        "assert model.generate('What is 1 + 2?', max_new_tokens=4).text\n"
        "print(sorted({'peft', 'datasets', 'pandas', 'matplotlib', 'fastapi', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]", done.stdout
