"""Merging: the folder is an ordinary causal LM, reads and writes what the adapter did, and is whole or not there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import s2t
from s2t.collect import collect
from s2t.config import CollectConfig, MergeConfig
from s2t.errors import ConfigError, ModelError
from s2t.files import RunFolder, write_json
from s2t.merge import merge
from s2t.model import merged as merged_module
from s2t.model.adapter import AdapterConfig, MergedSelector, SelectorAdapter, load_adapter, load_selector
from s2t.model.engine import Engine
from s2t.model.load import load_model, load_without_weights
from s2t.model.loaded import Head
from s2t.model.merged import ADAPTER_FOLDER, base_model, is_merged, read_merged

torch.set_num_threads(1)

PROMPTS = ["What is 12 + 31?", "A boy has 21 toys and", "One two three four"]
IDS = [[40, 50, 60, 70], [141, 142], [99, 98, 97, 300, 301]]
SHAPES = {
    "untied": ("qwen2", {}, 16),
    "tied": ("qwen2", {"tie_word_embeddings": True}, 16),
    "llama": ("llama", {}, 16),
    "gemma2": ("gemma2-eager", {}, 16),  # tied, soft-capped, scaled inputs
    "padding": ("qwen2", {"vocab_size": 1100}, 32),
    "added": ("qwen2", {}, 32),
    "added-tied": ("qwen2", {"tie_word_embeddings": True}, 32),
}
SCOPES = ("step", "rank-stream", "always", "candidates", "stream")


def base_of(folder, random_model, family="qwen2", changes=None):
    """A random model saved as anybody would save it."""
    loaded = random_model(family, **(changes or {}))
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


def adapter_of(base, folder, scope="always", criticality="head", num_bins=16, **changes):
    """A random adapter that triggers at most steps and moves away from greedy at many."""
    loaded = load_model(base, "float32")
    settings = {"head_size": 6, "lora_rank": 3, "prior_weight": 0.0, "thresholds": {"criticality": 0.4}} | changes
    readout = "rank" if scope in ("step", "rank-stream") else "bins"
    settings |= {"readout": readout, "scope": scope.removeprefix("rank-"), "num_bins": num_bins, "num_candidates": 4}
    config = AdapterConfig(base, loaded.fingerprint, criticality=criticality, **settings)
    torch.manual_seed(5)
    adapter = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3 if adapter.ranks else 0.1)
            elif name in ("selector.bins", "selector.yes_no"):
                parameter.normal_(0.0, 0.2)
    adapter.save(folder, ("aaaa", "bbbb"))
    return str(folder)


def made(tmp_path, random_model, shape="untied", scope="always", criticality="head", **settings):
    """Base, adapter and merged folder of one shape."""
    family, changes, num_bins = SHAPES[shape]
    base = base_of(tmp_path / "base", random_model, family, changes)
    adapter = adapter_of(base, tmp_path / "adapter", scope, criticality, num_bins)
    merge(MergeConfig(adapter=adapter, out=str(tmp_path / "merged"), **settings))
    return base, adapter, str(tmp_path / "merged")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, random_model):
    """One merge of each scope; tests that damage a folder copy it."""
    return {scope: made(tmp_path_factory.mktemp(scope), random_model, scope=scope) for scope in SCOPES}


every_shape = pytest.mark.parametrize("shape", SHAPES)
every_scope = pytest.mark.parametrize("scope", SCOPES)


@pytest.mark.parametrize(
    ("shape", "scope", "criticality"),
    [
        (shape, scope, ("head", "reserved")[(i + j) % 2])  # both readings under every scope
        for i, shape in enumerate(SHAPES)
        for j, scope in enumerate(SCOPES)
    ],
)
def test_a_merged_folder_writes_and_reads_what_the_adapter_did(shape, scope, criticality, tmp_path, random_model):
    base, adapter, merged = made(tmp_path, random_model, shape, scope, criticality)
    before, after = s2t.load(base, adapter=adapter, dtype="float32"), s2t.load(merged)
    left, right = (model.generate(PROMPTS, max_new_tokens=24) for model in (before, after))
    assert [one.token_ids for one in left] == [one.token_ids for one in right]
    assert [one.text for one in left] == [one.text for one in right]
    assert [one.num_flips for one in left] == [one.num_flips for one in right]
    assert sum(one.num_flips for one in left) > 3, "nothing was selected"
    for one, other in zip(readings(before), readings(after), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def readings(reasoner):
    """Next-token logits, scores and criticality of some prompts."""
    adapter = reasoner.pair.adapter
    engine = Engine(reasoner.pair.slm, len(IDS), adapter)
    rows = list(range(len(IDS)))
    hidden = engine.extend(rows, IDS)
    with torch.inference_mode():
        logits = engine.logits(hidden)
        top = logits.log_softmax(-1).topk(4)
        return (
            logits,
            adapter.scores(_read(engine, adapter, rows, top.indices), top.indices, top.values),
            adapter.criticality(hidden),
        )


def _read(engine, adapter, rows, ids):
    """What scores are read from: the last tokens once more, or the candidates."""
    if adapter.ranks:
        last = torch.tensor([[prompt[-1]] for prompt in IDS])
        return engine.step((), (), rows, last, back=1)[1]
    return engine.branch(rows, ids)


@every_shape
def test_output_rows_of_the_reserved_ids_are_the_bins(shape, tmp_path, random_model):
    base, adapter, merged = made(tmp_path, random_model, shape, criticality="reserved")
    selector = load_adapter(adapter, load_model(base)).selector
    model = AutoModelForCausalLM.from_pretrained(merged)
    config = read_merged(merged)
    rows = model.get_output_embeddings().weight
    assert torch.equal(rows[list(config.reserved.bins)], selector.bins)
    assert torch.equal(rows[list(config.reserved.criticality)], selector.yes_no)
    assert rows.shape[0] == max(max(config.reserved.all) + 1, SHAPES[shape][1].get("vocab_size", 1024))
    tied = model.get_input_embeddings().weight is rows
    assert tied == (shape in ("tied", "gemma2", "added-tied"))
    hidden = torch.randn(2, rows.shape[1])
    with torch.inference_mode():
        logits = Head(model)(hidden)[:, list(config.reserved.bins)]
        bins = selector.bin_logits(hidden)
    if config.head["softcap"]:  # the model's own logits are capped after these rows
        logits = torch.atanh((logits / config.head["softcap"]).double()).float() * config.head["softcap"]
        torch.testing.assert_close(logits[bins.abs() < 6], bins[bins.abs() < 6], rtol=1e-2, atol=1e-2)
    else:
        torch.testing.assert_close(logits, bins)


@every_shape
def test_a_merged_folder_is_an_ordinary_causal_lm(shape, tmp_path, random_model):
    base, adapter, merged = made(tmp_path, random_model, shape)
    adapted = load_adapter(adapter, load_model(base))
    adapted.act(True)
    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.get_vocab() == adapted.loaded.tokenizer.get_vocab()
    assert tokenizer.chat_template == adapted.loaded.tokenizer.chat_template
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    words = [i for i in range(1024) if i not in read_merged(merged).reserved.all]
    with torch.inference_mode():
        torch.testing.assert_close(
            model(ids).logits[..., words], adapted.base_model(ids).logits[..., words], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("shape", ["untied", "tied", "added"])
def test_under_scope_candidates_the_weights_are_the_base_bit_for_bit(shape, tmp_path, random_model):
    base, adapter, merged = made(tmp_path, random_model, shape, "candidates")
    before, after = load_file(Path(base) / "model.safetensors"), load_file(Path(merged) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("adapter_model.safetensors", "s2t_selector.safetensors", "s2t_config.json", "train_problems.txt"):
        assert (Path(adapter) / name).read_bytes() == (Path(merged) / ADAPTER_FOLDER / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    plain, folder = (
        AutoModelForCausalLM.from_pretrained(name).generate(**inputs, max_new_tokens=16) for name in (base, merged)
    )
    assert torch.equal(plain, folder)


@pytest.mark.parametrize("shape", ["untied", "tied", "added"])
@pytest.mark.parametrize("criticality", ["head", "reserved"])
def test_readout_rank_leaves_every_row_that_it_does_not_read(criticality, shape, tmp_path, random_model):
    base, adapter, merged = made(tmp_path, random_model, shape, "rank-stream", criticality)
    before, after = load_file(Path(base) / "model.safetensors"), load_file(Path(merged) / "model.safetensors")
    yes_no = list(read_merged(merged).reserved.criticality)
    settings = json.loads((Path(merged) / "generation_config.json").read_text())
    card = (Path(merged) / "README.md").read_text()
    if criticality == "head":
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert "suppress_tokens" not in settings
        assert "base model, unchanged" in card and "reserved ids" not in card
        return
    head = AutoModelForCausalLM.from_pretrained(merged).get_output_embeddings().weight
    own = AutoModelForCausalLM.from_pretrained(base).get_output_embeddings().weight
    assert torch.equal(head[yes_no], load_adapter(adapter, load_model(base)).selector.yes_no)
    others = [i for i in range(len(own)) if i not in yes_no]
    assert torch.equal(head[others], own[others])
    assert set(yes_no) <= set(settings["suppress_tokens"])
    assert f"| reserved ids | {min(yes_no)} to {max(yes_no)} (" in card and "| bins |" not in card


def test_plain_generate_never_writes_a_reserved_id(tmp_path, random_model):
    base = base_of(tmp_path / "base", random_model)
    folder = tmp_path / "adapter"
    adapter_of(base, folder)
    adapter = load_adapter(folder, load_model(base))
    with torch.no_grad():
        adapter.selector.bins.mul_(400)
    adapter.save(folder)
    merge(MergeConfig(adapter=str(folder), out=str(tmp_path / "merged")))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor(IDS[0])[None]
    reserved = set(read_merged(tmp_path / "merged").reserved.all)
    assert set(model.generate(ids, max_new_tokens=20)[0].tolist()).isdisjoint(reserved)
    assert int(model(ids).logits[0, -1].argmax()) in reserved, "there was nothing to leave out"
    greedy = s2t.load(str(tmp_path / "merged")).generate(PROMPTS[0], strategy="greedy", max_new_tokens=20)
    assert set(greedy.token_ids).isdisjoint(reserved)


@every_scope
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_weights_can_be_chosen(scope, dtype, tmp_path, random_model):
    _, _, merged = made(tmp_path, random_model, scope=scope, dtype=dtype)
    wanted = getattr(torch, dtype)
    assert {tensor.dtype for tensor in load_file(Path(merged) / "model.safetensors").values()} == {wanted}
    assert AutoModelForCausalLM.from_pretrained(merged).dtype == wanted
    assert read_merged(merged).dtype == dtype
    assert s2t.load(merged, dtype="float32").generate(PROMPTS[0], max_new_tokens=8).num_triggered > 0


@every_scope
def test_the_adapter_and_its_base_are_left_alone(scope, folders):
    base, adapter, _ = folders[scope]
    loaded = load_model(base)
    again = load_adapter(adapter, loaded)
    assert again.config.base_fingerprint == load_model(base).fingerprint


@every_scope
def test_what_the_folder_says_of_itself(scope, folders):
    base, adapter, merged = (Path(folder) for folder in folders[scope])
    config = read_merged(merged)
    assert config.scope == scope.removeprefix("rank-") and config.adapter == json.loads(
        (adapter / "s2t_config.json").read_text()
    )
    assert {"torch", "transformers", "peft", "s2t"} <= config.versions.keys()
    files = {str(path.relative_to(merged)) for path in merged.rglob("*.safetensors")}
    assert files == set(config.weights)
    card = (merged / "README.md").read_text()
    assert 'pipeline_tag: "text-generation"' in card and f'base_model: "{base}"' in card
    assert "| criticality | head |" in card and config.scope in card
    assert (merged / "custom_generate" / "generate.py").is_file()
    assert (merged / "custom_generate" / "requirements.txt").read_text().startswith("s2t>=")


def test_measured_accuracies_go_into_the_card(tmp_path, folders):
    _, adapter, _ = folders["always"]
    run = RunFolder.open(tmp_path / "run", "eval", MergeConfig(adapter=adapter))
    scores = {"accuracy": 0.638, "ci95": [0.608, 0.667], "num_problems": 1000, "trigger_rate": 0.04, "flip_rate": 0.013}
    document = {"task": "gsm8k", "split": "test", "seed": 0, "strategies": {"s2t-local": scores}}
    write_json(run.file("summary.json"), document)
    run.finish()
    settings = {"out": str(tmp_path / "merged"), "eval": str(tmp_path / "run")}
    merge(MergeConfig(adapter=adapter, **settings))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "| s2t-local | 63.8 | 60.8 to 66.7 | 1000 |" in card and "gsm8k, split test, seed 0" in card
    assert read_merged(tmp_path / "merged").eval["strategies"]["s2t-local"]["ci95"] == [0.608, 0.667]
    other = folders["candidates"][1]
    with pytest.raises(ConfigError, match=r"measured adapter .*, not"):
        merge(MergeConfig(adapter=other, out=str(tmp_path / "other"), eval=str(tmp_path / "run")))


# Whole or not there


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def flip(name):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[-9] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def change(**changes):
    def damage(folder):
        config = json.loads((folder / "s2t_config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "s2t_config.json").write_text(json.dumps(kept))

    return damage


@pytest.mark.parametrize(
    ("scope", "damage", "message"),
    [
        ("always", flip("model.safetensors"), "damaged: model.safetensors is not the file"),
        ("always", cut("model.safetensors"), "damaged: model.safetensors is not the file"),
        ("always", lambda f: (f / "s2t_selector.safetensors").unlink(), "s2t_selector.safetensors is missing"),
        ("always", lambda f: shutil.copy(f / "model.safetensors", f / "x.safetensors"), "x.safetensors was not there"),
        (
            "candidates",
            flip(f"{ADAPTER_FOLDER}/adapter_model.safetensors"),
            "adapter_model.safetensors is not the file",
        ),
        ("always", change(format_version=2, s2t_version="9.0"), "by a newer s2t \\(9.0\\); upgrade"),
        ("always", change(from_the_future=1), "by a newer s2t"),
        ("always", change(reserved=None), "damaged: s2t_config.json lacks 'reserved'"),
        ("always", change(adapter={}), "damaged: s2t_config.json lacks 'scope'"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(scope, damage, message, folders, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(folders[scope][2], folder)
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        s2t.load(str(folder))
    assert "\n" not in str(caught.value)


def test_the_folder_one_stands_in_and_a_link_are_written_where_they_are(folders, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = {"adapter": folders["always"][1]}
    merge(MergeConfig(**config, out="."))
    assert is_merged(tmp_path / "here")
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for _ in range(2):
        merge(MergeConfig(**config, out=str(tmp_path / "link"), overwrite=True))
    assert (tmp_path / "link").is_symlink() and is_merged(tmp_path / "here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]


@pytest.mark.parametrize("fails", ["merge._write_rest", "merge._write_texts", "model.merged._put_in_place"])
def test_a_merge_that_is_cut_short_leaves_nothing(fails, folders, tmp_path, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"s2t.{fails}", full_disk)
    with pytest.raises(s2t.errors.DataError, match="cannot be written: No space"):
        merge(MergeConfig(adapter=folders["always"][1], out=str(tmp_path / "merged")))
    assert list(tmp_path.iterdir()) == []


def test_a_killed_merge_leaves_no_folder_that_passes_for_a_model(folders, tmp_path):
    out = tmp_path / "merged"
    code = (
        "import os, signal, sys, s2t.merge as m; from s2t.config import MergeConfig\n"
        "m._write_texts = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\n"  # all weights are written
        "m.merge(MergeConfig(adapter=sys.argv[1], out=sys.argv[2]))"
    )
    words = [sys.executable, "-c", code, folders["always"][1], str(out)]
    assert subprocess.run(words, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".merged.merging" / "model.safetensors").is_file()
    assert not is_merged(tmp_path / ".merged.merging")
    merge(MergeConfig(adapter=folders["always"][1], out=str(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_a_killed_merge_left_is_cleared_away(folders, tmp_path):
    (tmp_path / ".merged.merging").mkdir()
    (tmp_path / ".merged.merging" / "model.safetensors").write_bytes(b"half")
    merge(MergeConfig(adapter=folders["always"][1], out=str(tmp_path / "merged")))
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and is_merged(tmp_path / "merged")


def test_only_a_previous_merge_is_replaced_and_only_if_asked(folders, tmp_path):
    out = tmp_path / "merged"
    config = {"adapter": folders["always"][1], "out": str(out)}
    out.mkdir()
    merge(MergeConfig(**config))  # an empty folder may be filled
    with pytest.raises(ConfigError, match="pass --overwrite"):
        merge(MergeConfig(**config))
    merge(MergeConfig(**config | {"adapter": folders["candidates"][1]}, overwrite=True))
    assert read_merged(out).scope == "candidates"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    (out / "s2t_config.json").unlink()
    with pytest.raises(ConfigError, match="is no merged model"):
        merge(MergeConfig(**config, overwrite=True))
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize("scope", ["always", "candidates"])
def test_sharded_weights_are_hashed_one_by_one(scope, folders, tmp_path, monkeypatch):
    save_pretrained = PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        PreTrainedModel, "save_pretrained", lambda *args: save_pretrained(*args, max_shard_size="200KB")
    )
    out = tmp_path / "merged"
    merge(MergeConfig(adapter=folders[scope][1], out=str(out)))
    weights = read_merged(out).weights
    assert "model.safetensors.index.json" in weights and "model-00002-of-00003.safetensors" in weights
    left, right = (s2t.load(name).generate(PROMPTS[0], max_new_tokens=8) for name in (str(out), folders[scope][2]))
    assert left.token_ids == right.token_ids
    flip("model-00002-of-00003.safetensors")(out)
    with pytest.raises(ModelError, match=r"model-00002-of-00003\.safetensors is not the file"):
        s2t.load(str(out))


# Recognised everywhere


def test_an_adapter_may_still_be_put_on_a_merged_folder_of_its_base(folders):
    _, adapter, merged = folders["candidates"]
    assert isinstance(load_selector(adapter, load_model(merged)), SelectorAdapter)
    loaded = load_model(folders["always"][2])
    assert isinstance(load_selector(None, loaded), MergedSelector)
    with pytest.raises(ModelError, match="was trained on"):
        load_selector(adapter, loaded)


def test_a_merged_folder_is_no_adapter(folders):
    base, _, merged = folders["always"]
    with pytest.raises(ModelError, match=r"is a merged model, not an adapter; pass --slm"):
        s2t.load(base, adapter=merged)


def test_a_model_that_is_merged_already_can_be_merged_again(folders, tmp_path):
    merged = folders["always"][2]
    adapter = adapter_of(merged, tmp_path / "adapter", "always", num_bins=16)
    merge(MergeConfig(adapter=adapter, out=str(tmp_path / "twice")))
    question, settings = PROMPTS[1], {"max_new_tokens": 16}
    left = s2t.load(merged, adapter=adapter).generate(question, **settings)
    assert left.token_ids == s2t.load(str(tmp_path / "twice")).generate(question, **settings).token_ids


@pytest.fixture
def on_the_hub(folders, monkeypatch):
    """A merged model that the hub has as me/merged, at the revision v2 alone."""
    folder = Path(folders["step"][2])

    def downloaded(name, revision, what, fits):
        return folder if (name, revision) == ("me/merged", "v2") and fits(folder) else None

    monkeypatch.setattr(merged_module, "_downloaded", downloaded)
    return {"slm": "me/merged", "revision": "v2"}


def test_a_merged_model_of_the_hub_collects_with_its_own_selector(on_the_hub, folders, tmp_path):
    config = CollectConfig(
        **on_the_hub,
        llm=folders["step"][0],
        policy="s2t-local",
        threshold=-1.0,
        limit=2,
        max_new_tokens=8,
        dtype="float32",
        out=str(tmp_path / "collect"),
    )
    assert collect(config)["num_groups"] > 0
    with pytest.raises(ConfigError, match="strategy s2t-local needs --adapter"):
        collect(replace(config, revision=None, out=str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("slm", ["tiny:slm", "folder"])
def test_a_plain_model_that_is_here_does_not_collect_with_a_selector(slm, folders):
    with pytest.raises(ConfigError, match="policy s2t-local needs --adapter"):
        CollectConfig(slm=folders["step"][0] if slm == "folder" else slm, policy="s2t-local")


def test_the_revision_of_a_merged_model_is_kept_wherever_it_is_looked_at(on_the_hub, folders):
    known = load_without_weights(*on_the_hub.values())  # as for an SLM on servers
    assert known.merged is not None and known.merged.scope == "step"
    assert base_model(*on_the_hub.values()) == folders["step"][0]
