"""Numbers that are none never pass for a result: the first of them ends the work with one line that names the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2t.cli.main import main
from s2t.decode.label import label, llm_targets
from s2t.decode.loop import best_tokens
from s2t.decode.pair import Pair
from s2t.errors import ModelError
from s2t.records import Request

PROMPT = [5, 9, 12, 30, 7]
BAD = [float("nan"), float("inf")]


@pytest.fixture(params=BAD, ids=str)
def broken(request, new_model):
    """Make a model that gives NaN or infinite logits from the moment it reads token 12."""

    def make(seed):
        loaded = new_model(seed)
        with torch.no_grad():
            loaded.model.get_input_embeddings().weight[12] = request.param
        return loaded

    return make


def refusal(write, *models):
    with pytest.raises(ModelError, match="not finite") as raised:
        write()
    line = str(raised.value)
    assert len(line.splitlines()) == 1
    assert [name for name in ("random-0", "random-1", "under its adapter") if name in line] == list(models)


def writing(strategy, **models):
    return lambda: Pair(**models).write(strategy, [Request(0, [3, 4]), Request(1, PROMPT)], 8)


@pytest.mark.parametrize("name", ["greedy", "sample", "self-certainty"])
def test_an_slm_without_numbers_ends_the_run(name, strategy, broken):
    refusal(writing(strategy(name), slm=broken(0)), "random-0")


@pytest.mark.parametrize("name", ["llm", "takeover", "s2t", "s2t@entropy", "takeover@entropy"])
def test_an_llm_without_numbers_ends_the_run(name, strategy, broken, slm):
    base, _, trigger = name.partition("@")
    settings = {} if base == "llm" else {"trigger": trigger or "auto", "threshold": -1.0, "warmup_steps": 0}
    refusal(writing(strategy(base, **settings), slm=slm, llm=broken(1)), "random-1")


@pytest.mark.parametrize("part", ["bins", "head"])
@pytest.mark.parametrize("scope", ["candidates", "always", "stream"])
def test_an_adapter_without_numbers_ends_the_run(scope, part, strategy, new_model, new_adapter):
    adapter = new_adapter(new_model(0), scope)
    with torch.no_grad():
        parameters = [value for name, value in adapter.selector.named_parameters() if name.startswith(part)]
        parameters[0].fill_(float("nan"))
    settings = {"trigger": "never"} if part == "none" else {"threshold": -1.0, "warmup_steps": 0}
    write = writing(strategy("s2t-local", **settings), slm=adapter.loaded, adapter=adapter)
    refusal(write, "random-0", "under its adapter")


def test_labels_and_targets_are_not_read_from_models_without_numbers(broken, slm, llm):
    refusal(lambda: label(broken(0), llm, [PROMPT], [[6, 7, 8]]), "random-0")
    refusal(lambda: label(slm, broken(1), [PROMPT], [[6, 7, 8]]), "random-1")
    refusal(lambda: llm_targets(slm, broken(1), [PROMPT], [[6, 7, 8]]), "random-1")


def test_masked_tokens_are_no_fault():
    logits = torch.tensor([[float("-inf"), 1.0, 2.0], [0.0, float("-inf"), -1.0]])
    assert best_tokens(logits, "m") == [2, 0]
    for fault in ([float("-inf")] * 3, [0.0, float("nan"), 1.0], [float("inf"), 0.0, 0.0]):
        with pytest.raises(ModelError, match="model m "):
            best_tokens(torch.tensor([[0.0, 1.0, 2.0], fault]), "m")


@pytest.mark.parametrize("command", [["eval", "--strategies", "greedy"], ["measure", "--split", "test"], ["generate"]])
def test_a_command_ends_with_one_line(command, random_model, tmp_path, capsys):
    loaded = random_model()
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][loaded.tokenizer("7")["input_ids"][0]] = float("inf")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    rows = [{"question": f"What is 7 + {n}?", "answer": str(7 + n)} for n in range(60)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        ["7 + 7?"] if command[0] == "generate" else ["--task", tmp_path / "problems.jsonl", "--out", tmp_path / "out"]
    )
    capsys.readouterr()
    assert main([str(word) for word in (*command, *words, "--slm", tmp_path / "model")]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [line for line in captured.err.splitlines() if "not finite" in line]
    assert str(tmp_path / "model") in captured.err and not captured.out.strip()
