"""Steps of fixed shapes against eager ones: same states, whatever is batched, left out or branched."""

from __future__ import annotations

import functools

import pytest
import torch

from s2t.bench.decode import untrained_adapter
from s2t.decode.loop import Decoder
from s2t.methods.select import S2TLocal
from s2t.methods.strategies import Strategy
from s2t.methods.triggers import Random
from s2t.model.engine import Engine
from s2t.model.static import _columns, _power
from s2t.records import Request

FAMILIES = ("qwen2", "llama", "gemma", "gemma2-eager", "mistral", "qwen2-sliding")
PROMPTS = [[5, 9, 12, 30, 7], [8, 40, 77, 21, 300, 301, 302, 19], [99, 98, 97, 500, 501, 7, 7], [4, 6, 8, 11, 10, 40]]
ALL = range(len(PROMPTS))
K = 5


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def pair(loaded, execution, adapter=None, max_rows=6):
    """An eager engine and one of fixed shapes, both holding the prompts."""
    engines = [Engine(loaded, max_rows, adapter, how) for how in ("eager", execution)]
    for engine in engines:
        engine.extend(ALL, PROMPTS)
    return engines


def candidates(num_rows):
    return torch.randint(2, 900, (num_rows, K), generator=torch.Generator().manual_seed(num_rows))


def check_steps(eager, static, recorded):
    """Steps of all rows, of some, and with candidates beside them; `recorded` counts the shapes in between."""
    for rows in (list(ALL), [2, 0], [3], [1, 3], list(ALL)):
        tokens = [[20 + row] for row in rows]
        close(static.extend(rows, tokens), eager.extend(rows, tokens))
        assert static.lengths == eager.lengths
    for rows, branch_rows in ((list(ALL), [1]), ([0, 2, 3], [0, 2, 3]), ([1, 2], [3]), (list(ALL), [0, 1, 3])):
        ids = candidates(len(branch_rows)).to(eager.device)
        tokens = [[30 + row] for row in rows]
        found, expected = (engine.step(rows, tokens, branch_rows, ids) for engine in (static, eager))
        close(found[0], expected[0])
        close(found[1], expected[1])
        kept = torch.arange(len(branch_rows), device=eager.device) % K
        for engine in (static, eager):
            engine.keep_branch(branch_rows, kept)
    close(static.extend(ALL, [[17]] * 4), eager.extend(ALL, [[17]] * 4))
    assert [vars_of(work) for work in static.work] == [vars_of(work) for work in eager.work]
    assert recorded(static) > 1


def vars_of(work):
    return work.forwards, work.processed, work.flops


def num_shapes(engine):
    return len(engine._static._recordings)


@pytest.mark.parametrize("family", FAMILIES)
def test_static_steps_equal_eager_ones(random_model, family):
    check_steps(*pair(random_model(family), "static"), num_shapes)


@pytest.mark.parametrize("scope", ["candidates", "always"])
def test_static_steps_under_an_adapter_equal_eager_ones(random_model, scope):
    loaded = random_model("qwen2")
    adapter = untrained_adapter(loaded, "rank" if scope == "step" else "bins", scope)
    for name, parameter in adapter.base_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    check_steps(*pair(loaded, "static", adapter), num_shapes)


def test_compiled_steps_equal_eager_ones(random_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loaded = random_model("qwen2")
    check_steps(*pair(loaded, "compile", untrained_adapter(loaded, "bins", "candidates")), num_shapes)


def test_rows_longer_than_what_was_reserved_are_recorded_anew(random_model):
    eager, static = pair(random_model("qwen2"), "static")
    static.reserve(100)
    assert static.cache.capacity == 128
    for engine in (eager, static):
        engine.extend([1], [[7] * 300])
    close(static.extend(ALL, [[9]] * 4), eager.extend(ALL, [[9]] * 4))
    assert static.cache.capacity >= 309


def test_a_row_that_fits_what_was_reserved_makes_no_larger_store(random_model):
    eager, static = pair(random_model("qwen2"), "static")
    for engine in (eager, static):
        engine.reserve(300)
        engine.extend([0], [[7] * 270])
    assert static.cache.capacity == 384 and _columns(385) == 512
    for engine in (eager, static):
        engine.extend([0], [[7] * (384 - 1 - engine.lengths[0])])
    close(static.extend(ALL, [[9]] * 4), eager.extend(ALL, [[9]] * 4))
    assert static.lengths[0] == static.cache.capacity == 384


def test_an_engine_on_a_cpu_runs_eagerly_unless_told_otherwise(random_model):
    loaded = random_model("qwen2")
    assert Engine(loaded, 1)._static is None
    assert Engine(loaded, 1, execution="static")._static is not None


@pytest.mark.parametrize("scope", ["step", "candidates", "always"])
def test_the_loop_writes_the_same_in_fixed_shapes(random_model, scope):
    loaded = random_model("qwen2")
    adapter = untrained_adapter(loaded, "rank" if scope == "step" else "bins", scope)
    strategy = Strategy("s2t-local", Random(), 0.2, S2TLocal(), K)

    def write(execution):
        decoder = Decoder(Engine(loaded, 3, adapter, execution), strategy, None, 24)
        steps = decoder.run([Request(i, ids, str(i)) for i, ids in enumerate(PROMPTS)])
        found = sorted((s.request, s.index, s.token_id, s.fired) for s in steps)
        return found, decoder.costs

    assert write("static") == write("eager")
    assert any(fired for *_, fired in write("static")[0])


def test_shapes_are_rounded_up_to_few_sizes():
    assert [_power(n, 2) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
    assert [_columns(n) for n in (1, 256, 257, 385, 513, 1000, 1025)] == [256, 256, 384, 512, 768, 1024, 1536]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself
def test_steps_through_the_real_compiler_equal_eager_ones(random_model):
    loaded = random_model("gemma")
    check_steps(*pair(loaded, "compile", untrained_adapter(loaded, "bins", "candidates")), num_shapes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("execution", ["static", "compile"])
@pytest.mark.parametrize("scope", ["candidates", "always"])
def test_graphs_on_a_gpu_equal_eager_steps(random_model, scope, execution):
    loaded = random_model("qwen2")
    loaded.model.to("cuda")
    check_steps(
        *pair(loaded, execution, untrained_adapter(loaded, "rank" if scope == "step" else "bins", scope)), num_shapes
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_are_recorded_anew_where_the_store_grows(random_model):
    loaded = random_model("qwen2")
    loaded.model.to("cuda")
    eager, static = pair(loaded, "static")
    for length in (0, 300, 600):
        for engine in (eager, static):
            engine.reserve(length)
        for _ in range(3):
            close(static.extend(ALL, [[9]] * 4), eager.extend(ALL, [[9]] * 4))
