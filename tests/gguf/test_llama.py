"""The llama.cpp engine against the torch engine, in float32 with a float32 cache: the same loop writes the same tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import s2t
from s2t.cli.main import main
from s2t.config import DecodeConfig
from s2t.decode.pair import Pair
from s2t.decode.workload import requests_for
from s2t.methods.strategies import build_strategy
from s2t.model.engine import Engine
from s2t.model.gguf import library
from s2t.model.gguf.file import read_header
from s2t.model.gguf.opening import open_model, open_selector
from s2t.model.load import load_model
from s2t.tasks.problems import load_task

pytest.importorskip(
    "llama_cpp", reason="llama-cpp-python is not installed: pip install s2t[gguf]", exc_type=ImportError
)

TASK = "rg:gsm_symbolic,max_number=100"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def opened(gguf_file):
    """A GGUF file in llama.cpp, float32 with a float32 cache, with the adapter of a folder beside it."""

    def make(model="tiny:slm", adapter=None):
        loaded = open_model(str(gguf_file(model)), {"dtype": "float32"}, "llama.cpp", threads=1)
        return loaded, open_selector(adapter, loaded)

    return make


def both(opened, model):
    """An engine of llama.cpp and one of torch with the same weights."""
    loaded = load_model(model) if isinstance(model, str) else model
    return opened(model)[0].open_engine(4), Engine(loaded, 4, execution="eager")


def assert_same(llama, own, states, expected):
    torch.testing.assert_close(llama.head(states), own.head(expected), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(states[..., : llama.head.width], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3"])
def test_every_operation_equals_torch(family, random_model, opened):
    llama, own = both(opened, random_model(family, num_key_value_heads=2))

    def check(call):
        for found, expected in zip(call(llama), call(own), strict=True):
            assert_same(llama, own, found, expected)

    candidates = torch.tensor([[10, 11, 12], [20, 21, 22]])
    check(lambda engine: [engine.extend([0, 1], [[5, 60, 70, 80], [7, 8]])])
    check(lambda engine: engine.step([0, 1], [[3], [4]], [0, 1], candidates))
    check(lambda engine: engine.step([1], [[30]], [0, 1], torch.tensor([[3], [4]]), 1))
    check(lambda engine: [engine.branch([0], candidates[:1])])
    for engine in (llama, own):
        engine.keep_branch([0], torch.tensor([2]))
        engine.copy([0], [2])
    check(lambda engine: [engine.extend([2, 0], [[40], [41]])])
    for engine in (llama, own):
        engine.crop([0], [3])
    check(lambda engine: engine.read([0, 1], [[42, 43, 44], [7]], [2, 1]))
    check(lambda engine: [engine.extend([3], [list(range(5, 300))])])  # the cache grows
    check(lambda engine: [engine.extend([0, 1, 2], [[1], [2], [3]])])
    assert llama.lengths == own.lengths
    costs = [
        [work.flops for work in engine.work[1:]] for engine in (llama, own)
    ]  # row 0 read what it accepted once more
    assert costs[0] == pytest.approx(costs[1])


def test_candidates_equal_one_forward_each(opened):
    llama, _ = both(opened, "tiny:slm")
    llama.extend([0], [[2, 50, 60, 70]])
    candidates = torch.arange(30, 50)[None]
    tree = llama.branch([0], candidates)[0]
    for token, state in zip(candidates[0].tolist(), tree, strict=True):
        other = llama.loaded.open_engine(1)
        torch.testing.assert_close(state, other.extend([0], [[2, 50, 60, 70, token]])[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("info", [b"AVX2 = 1 | REPACK = 1 | ", b"AVX512 = 1 | AMX_INT8 = 1 | "])
def test_weights_are_not_repacked_for_amx_whose_code_ends_the_process(info, gguf_file, monkeypatch):
    api, seen = library.llama(), []
    own = api.llama_model_load_from_file
    monkeypatch.setattr(api, "llama_print_system_info", lambda: info)
    monkeypatch.setattr(
        api, "llama_model_load_from_file", lambda path, params: seen.append(params) or own(path, params)
    )
    open_model(str(gguf_file("tiny:slm")), {"dtype": "float32"}, "llama.cpp", threads=1)
    assert [params.use_extra_bufts for params in seen] == [b"AMX" not in info]


def problems(pair, count):
    task = load_task(TASK, "plain")
    return requests_for(pair, task, task.problems("test", count, 0))


def facts(done):
    return [(sequence.token_ids, [(step.fired, step.flip) for step in sequence.steps]) for sequence in done]


def compare(opened, save_adapter, strategy, count, scope="step", batch_size=8, llm=None, max_new_tokens=48):
    """Write problems on both engines; tokens, triggers and flips have to be the same. Returns those of torch."""
    adapter = save_adapter("tiny:slm", scope) if "adapter" in strategy.needs else None
    slm, selector = opened("tiny:slm", adapter)
    ours = Pair(slm, opened(llm)[0] if llm else None, selector, batch_size)
    loaded = load_model("tiny:slm", dtype="float32")
    theirs = Pair(loaded, load_model(llm) if llm else None, open_selector(adapter, loaded), batch_size)
    done = [
        facts(pair.write(strategy, problems(pair, count), max_new_tokens, keep_steps=True)) for pair in (ours, theirs)
    ]
    assert done[0] == done[1]
    return done[1]


def make(name, **settings):
    return build_strategy(name, replace(DecodeConfig(num_candidates=8), **settings), {"criticality": 0.5})


@pytest.mark.parametrize("scope", ["step", "candidates"])
def test_s2t_local_equals_torch_on_100_problems(scope, opened, save_adapter):
    done = compare(opened, save_adapter, make("s2t-local"), 100, scope)
    steps = [step for _, steps in done for step in steps]
    assert sum(fired for fired, _ in steps) > 100, "the trigger fires"
    assert sum(flip for _, flip in steps) > 20, "and the selector flips"


@pytest.mark.parametrize("name", ["greedy", "sample", "self-consistency"])
def test_plain_strategies_equal_torch(name, opened, save_adapter):
    compare(opened, save_adapter, make(name), 24)


@pytest.mark.parametrize("name", ["s2t", "takeover"])
@pytest.mark.parametrize("trigger", ["divergence", "entropy"])
def test_a_second_file_is_the_llm(name, trigger, opened, save_adapter):
    done = compare(opened, save_adapter, make(name, trigger=trigger, threshold=0.3), 12, llm="tiny:llm")
    assert any(flip for _, steps in done for _, flip in steps)


def test_one_row_writes_what_many_write(opened, save_adapter):
    slm, selector = opened("tiny:slm", save_adapter())
    strategy = make("s2t-local")
    pair = Pair(slm, None, selector)
    requests = problems(pair, 12)
    many, one = (facts(pair.write(strategy, requests, 40, keep_steps=True, batch_size=size)) for size in (12, 1))
    assert many == one


def test_an_adapter_that_learned_nothing_is_greedy(opened, save_adapter):
    slm, selector = opened("tiny:slm", save_adapter("tiny:slm", "step", lora=0.0))
    pair = Pair(slm, None, selector)
    requests = problems(pair, 12)
    local, greedy = (
        [done.token_ids for done in pair.write(make(name), requests, 40)] for name in ("s2t-local", "greedy")
    )
    assert local == greedy


def test_reading_under_the_adapter_leaves_the_base_as_it_was(opened, save_adapter):
    slm, selector = opened("tiny:slm", save_adapter())
    plain, adapted = slm.open_engine(1), slm.open_engine(1, selector)
    states = []
    for engine in (plain, adapted):
        engine.extend([0], [[2, 50, 60, 70]])
        if engine is adapted:
            engine.step([], [], [0], torch.tensor([[70]]), 1)
        states.append(engine.extend([0], [[71, 72]]))
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--slm", "tiny:slm", "--engine", "llama.cpp"], "runs GGUF files, and tiny:slm is none"),
        (["--slm", "FILE", "--engine", "llama.cpp", "--device", "meta"], "runs on the CPU here"),
        (["--slm", "FILE", "--engine", "llama.cpp", "--quantization", "bitsandbytes-4bit"], "takes no quantization"),
        (["--slm", "FILE", "--engine", "llama.cpp", "--adapter", "ALWAYS"], "this one has scope always"),
        (["--slm", "FILE", "--engine", "nonsense"], "engine must be one of"),
        (["--slm", "FILE", "--threads", "-1"], "threads must be at least 0"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(words, told, gguf_file, save_adapter, capsys):
    places = {"FILE": str(gguf_file()), "ALWAYS": str(save_adapter("tiny:slm", "always")) if "ALWAYS" in words else ""}
    assert main(["generate", *(places.get(word, word) for word in words), "What is 3 + 4?"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("busy", "expected"), [(0, 4), (3, 4), (6, 2), (30, 1)])
def test_threads_leave_busy_cores_alone(busy, expected, monkeypatch):
    monkeypatch.setattr(library, "_num_busy", lambda: busy)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("psutil.cpu_count", lambda logical: 8 if logical else 4)
    assert library.default_threads() == expected


def test_measure_has_no_engine(gguf_file, capsys):
    assert main(["measure", "--slm", str(gguf_file()), "--llm", "tiny:llm", "--engine", "llama.cpp"]) == 2
    assert "--engine" in capsys.readouterr().err


def test_load_takes_a_file_and_answers(gguf_file, save_adapter, capsys):
    reasoner = s2t.load(str(gguf_file()), adapter=str(save_adapter()), dtype="float32", threads=1, context=128)
    answer = reasoner.generate("What is 3 + 4?", max_new_tokens=500, threshold=0.3)
    assert answer.num_triggered > 0
    assert len(answer.token_ids) < 128, "prompt and answer share the context"
    told = reasoner.pair.slm.facts
    assert told["engine"] == "llama.cpp" and told["quantization"] == "float32" and told["context_length"] == 128
    assert told["cache_bytes"] == 128 * 4 * read_header(gguf_file()).cached_values
