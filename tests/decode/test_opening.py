"""What opening a pair loads: no more than its strategies need."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from s2t.config import GenerateConfig, ModelConfig
from s2t.decode.opening import open_pair
from s2t.errors import ConfigError, ModelError
from s2t.records import Request


@dataclass
class Loads:
    """Stands in for `load_model`: SLMs are fresh copies, anything else fails as a missing model would."""

    new_model: object
    asked: list[str]

    def __call__(self, name, **options):
        self.asked.append(name)
        if name != "slm":
            raise ModelError(f"model {name} was not found")
        return self.new_model(0)


@pytest.fixture
def loads(monkeypatch, new_model):
    loads = Loads(new_model, [])
    monkeypatch.setattr("s2t.model.gguf.opening.load_model", loads)
    return loads


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, new_model, new_adapter):
    folder = tmp_path_factory.mktemp("adapter")
    new_adapter(new_model(0)).save(folder)
    return folder


@pytest.mark.parametrize("given_llm", [None, "llm"])
def test_s2t_local_runs_with_no_llm_present(given_llm, loads, adapter_folder, strategy, prompts, write, tokens):
    pair = open_pair(
        GenerateConfig(slm="slm", llm=given_llm, adapter=str(adapter_folder), batch_size=4), ["greedy", "s2t-local"]
    )
    assert loads.asked == ["slm"]
    assert pair.llm is None
    how = strategy("s2t-local", trigger="random", threshold=0.5)
    done = pair.write(how, [Request(i, p, f"problem-{i}") for i, p in enumerate(prompts)], 24)
    assert tokens(done) == tokens(write(how))  # the adapter of the folder is the one that was saved
    assert sum(s.num_triggered for s in done) > 0


def test_a_missing_llm_fails_only_where_it_is_read(loads):
    open_pair(ModelConfig(slm="slm", llm="llm"), ["greedy", "sample", "self-consistency"])
    assert loads.asked == ["slm"]
    with pytest.raises(ModelError, match="model llm was not found"):
        open_pair(ModelConfig(slm="slm", llm="llm"), ["greedy", "s2t"])


@pytest.mark.parametrize("name", ["s2t", "takeover", "llm"])
def test_a_strategy_that_needs_the_llm_says_so_before_loading_anything(name, loads):
    with pytest.raises(ConfigError, match=f"strategy {name} needs the LLM; pass --llm MODEL"):
        open_pair(ModelConfig(slm="slm", llm=None), ["greedy", name])
    assert loads.asked == []


def test_s2t_local_without_an_adapter_says_so_before_loading_anything(loads):
    with pytest.raises(ConfigError, match="strategy s2t-local needs --adapter"):
        open_pair(ModelConfig(slm="slm"), ["s2t-local"])
    assert loads.asked == []
