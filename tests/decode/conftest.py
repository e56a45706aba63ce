"""Small random pairs for the laws of decoding: sharp enough that argmax is never a near tie, quick enough to be many."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from s2t.combine import combine
from s2t.config import DecodeConfig, EvalConfig
from s2t.decode.pair import Pair
from s2t.decode.workload import open_task
from s2t.evaluate import evaluate
from s2t.files import iter_jsonl, write_json
from s2t.methods import relay, steps
from s2t.methods.strategies import Strategy, build_strategy
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.forecast import ForecastConfig, ForecastHead, save_forecast
from s2t.model.load import wrap_model
from s2t.model.loaded import LoadedModel
from s2t.model.router import Router, RouterConfig, save_router
from s2t.records import Generated, Request


@pytest.fixture
def round_of() -> Callable[..., Any]:
    """What a method sees of some places: these logits [n, V], and whatever else a test gives it."""

    def make(logits: torch.Tensor, **fields: Any) -> Any:
        greedy = logits.argmax(-1).tolist()
        own = {
            "logits": logits,
            "num_written": [0] * len(logits),
            "greedy": greedy,
            "tokens": greedy,
            "num_listed": None,
        }
        return SimpleNamespace(**own | fields)

    return make


torch.set_num_threads(1)  # models this small only lose by sharing cores

NUM_WORDS, NUM_RESERVED, STOP = 40, 18, 1
VOCAB = NUM_WORDS + NUM_RESERVED  # rows past it are padding
PROMPTS = ([5, 9, 12, 30, 7], [8], [3, 4, 5, 6, 7, 8, 9, 10, 11], [22, 31, 6], [17, 17, 2, 35], [29, 14])
MAX_NEW_TOKENS = 24


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<stop>", *(f"w{i}" for i in range(2, NUM_WORDS))]
    vocab = {word: i for i, word in enumerate([*words, *(f"<|reserved_{i}|>" for i in range(NUM_RESERVED))])}
    core = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<stop>", pad_token="<pad>")


def make_model(seed: int, num_rows: int = VOCAB + 6, width: int = 32) -> LoadedModel:
    """A random Qwen2 whose next-token distributions are sharp; the same seed gives the same weights."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=num_rows,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=STOP,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    return wrap_model(f"random-{seed}", Qwen2ForCausalLM(config).float(), make_tokenizer())


def make_adapter(loaded: LoadedModel, scope: str = "candidates", **changes: Any) -> SelectorAdapter:
    """A random adapter that acts strongly: LoRA, bins and criticality head all far from zero.

    `step` and `rank-stream` are scopes of readout rank, the others of bins.
    """
    settings: dict[str, Any] = {
        "head_size": 8,
        "lora_rank": 4,
        "lora_dropout": 0.0,
        "num_candidates": 4,
    } | changes
    readout = "rank" if scope in ("step", "rank-stream") else "bins"
    scope = scope.removeprefix("rank-")
    config = AdapterConfig(loaded.name, loaded.fingerprint, readout=readout, scope=scope, **settings)
    torch.manual_seed(7)
    adapter = SelectorAdapter(loaded, config)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            if "lora_B" in name or name.startswith("selector."):
                parameter.normal_(0.0, 0.3)
    adapter.selector.requires_grad_(False)
    return adapter


@pytest.fixture(scope="session")
def slm() -> LoadedModel:
    return make_model(0)


@pytest.fixture(scope="session")
def llm() -> LoadedModel:
    """Wider than the SLM, and with another number of padding rows."""
    return make_model(1, num_rows=VOCAB + 14, width=48)


SCOPES = ("step", "rank-stream", "candidates", "always", "stream")


@pytest.fixture(scope="session")
def adapters() -> dict[str, SelectorAdapter]:
    """A random adapter of each scope on its own copy of the SLM."""
    return {scope: make_adapter(make_model(0), scope) for scope in SCOPES}


@pytest.fixture(scope="session")
def new_model() -> Callable[..., LoadedModel]:
    return make_model


@pytest.fixture(scope="session")
def new_adapter() -> Callable[..., SelectorAdapter]:
    return make_adapter


@pytest.fixture(scope="session")
def prompts() -> tuple[list[int], ...]:
    return PROMPTS


@pytest.fixture(scope="session")
def strategy() -> Callable[..., Strategy]:
    """Make a strategy from its name and settings; `threshold` is in the trigger's own unit."""

    def make(name: str, seed: int = 0, **settings: Any) -> Strategy:
        return build_strategy(name, replace(DecodeConfig(num_candidates=4), **settings), {}, seed=seed)

    return make


@pytest.fixture(scope="session")
def write(slm: LoadedModel, llm: LoadedModel, adapters: dict[str, SelectorAdapter]) -> Callable[..., list[Generated]]:
    """Write the prompts with a strategy, all steps kept."""

    def run(
        strategy: Strategy,
        batch_size: int = 8,
        scope: str = "candidates",
        prompts: Sequence[Sequence[int]] = PROMPTS,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **models: Any,
    ) -> list[Generated]:
        adapter = adapters[scope] if strategy.name == "s2t-local" else None
        parts = {"slm": adapter.loaded if adapter else slm, "llm": llm, "adapter": adapter} | models
        pair = Pair(**parts, batch_size=batch_size)
        requests = [Request(i, prompt, f"problem-{i}") for i, prompt in enumerate(prompts)]
        return pair.write(strategy, requests, max_new_tokens, keep_steps=True)

    return run


@pytest.fixture(scope="session")
def tokens() -> Callable[[Sequence[Generated]], list[list[int]]]:
    return lambda done: [sequence.token_ids for sequence in done]


# Methods beside ours


@pytest.fixture
def words(monkeypatch):
    """The question and the marks in the words of the small vocabulary."""
    monkeypatch.setattr(steps, "QUESTION", "w11 w12")
    monkeypatch.setattr(steps, "DIGITS", tuple(f"w{i}" for i in range(20, 30)))


@pytest.fixture(scope="session")
def router(tmp_path_factory, slm):
    """An untrained router with large weights, so that some places fire and others do not."""
    folder = tmp_path_factory.mktemp("router")
    torch.manual_seed(3)
    made = Router(RouterConfig(slm.name, 32))
    with torch.no_grad():
        made.layers[-1].weight.mul_(20)
    save_router(made, folder)
    return str(folder)


@pytest.fixture(scope="session")
def forecast(tmp_path_factory, slm):
    """Untrained forecasts with large weights."""
    folder = tmp_path_factory.mktemp("forecast")
    torch.manual_seed(5)
    made = ForecastHead(ForecastConfig(slm.name, 32, (4.0, 12.0, 24.0)))
    with torch.no_grad():
        made.layers[-1].weight.normal_()
    save_forecast(made, folder)
    return str(folder)


@pytest.fixture
def rival(words, slm, llm, adapters, strategy, router, forecast, prompts, monkeypatch, tmp_path):
    """Write the prompts with one of the methods; steps end at w7, and bare prompts are the second half.

    `scope` names an adapter; `call` is the tag of relay, `calls_for` what any text calls for; `places` are the critical ones;
    `behind` has the SLM write so many tokens first.
    """

    def begin(pair, count):
        return pair.write(strategy("greedy"), [Request(i, prompt) for i, prompt in enumerate(prompts)], count)

    def write(
        name,
        batch_size=8,
        seed=0,
        max_new_tokens=24,
        models=None,
        scope=None,
        call=None,
        calls_for=None,
        places=None,
        behind=0,
        **settings,
    ):
        if call is not None:
            monkeypatch.setattr(relay, "TAG", re.compile(call))
        if calls_for is not None:
            any_text = SimpleNamespace(search=lambda tail: {1: calls_for} if tail else None)
            monkeypatch.setattr(relay, "TAG", any_text)
        if places is not None:
            settings["critical"] = str(tmp_path / "critical.json")
            write_json(tmp_path / "critical.json", {f"problem-{i}": list(places) for i in range(len(prompts))})
        how = strategy(name, seed=seed, **{"router": router, "forecast": forecast, "step_end": "w7", **settings})
        slm_, llm_ = models or (slm, llm)
        adapter = adapters[scope] if scope is not None else None
        pair = Pair(slm_ if adapter is None else adapter.loaded, llm_, adapter, batch_size=batch_size)
        begun = [sequence.token_ids for sequence in begin(pair, behind)] if behind else [[] for _ in prompts]
        requests = [
            Request(i, [*prompt, *begun[i]], f"problem-{i}/0", bare_prompt_ids=prompt[len(prompt) // 2 :])
            for i, prompt in enumerate(prompts)
        ]
        done = pair.write(how, requests, max_new_tokens - behind, keep_steps=True, trace=False)
        for sequence, first in zip(done, begun, strict=True):
            sequence.token_ids[:0] = first
        return done

    return write


# Finished answers of the embedded pair, to choose among

SMALL = {"llm": "tiny:llm", "limit": 4, "max_new_tokens": 24, "num_traces": 0, "num_samples": 3}
OVER_TWO = ("cascade", "frugalgpt", "knn-routing")


@pytest.fixture(scope="session")
def known(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("known"))
    evaluate(EvalConfig(strategies="confidence,llm", split="calibration", out=out, **SMALL))
    return out


@pytest.fixture(scope="session")
def own_forecast(tmp_path_factory, tiny_slm):
    """Forecasts that were never trained: every sample ends right with the same probability."""
    folder = tmp_path_factory.mktemp("forecast")
    width = tiny_slm.model.config.hidden_size
    save_forecast(ForecastHead(ForecastConfig(tiny_slm.name, width, (4.0, 12.0, 24.0))), folder)
    return str(folder)


@pytest.fixture(scope="session")
def answers(known, own_forecast, tmp_path_factory):
    """One run of all of them, with the settings that made it and the results by strategy."""
    strategies = ",".join((*OVER_TWO, "borda", "deepconf", "zip-rc", "greedy", "sample", "self-consistency"))
    config = EvalConfig(
        strategies=strategies, known=known, forecast=own_forecast, out=str(tmp_path_factory.mktemp("run")), **SMALL
    )
    summary, found = evaluate(config), {}
    assert evaluate(config) == summary, "resumed = whole"
    for _, result in iter_jsonl(Path(config.out) / "results.jsonl"):
        found.setdefault(result["strategy"], []).append(result)
    assert set(found) == set(summary["strategies"]) == set(config.strategy_names)
    return config, found, summary["strategies"]


@pytest.fixture(scope="session")
def chosen(answers):
    """What a method chooses at another threshold, from the same answers."""
    config, found, _ = answers
    task = open_task(config, config.slm)
    problems = task.problems("test", config.limit, 0)

    def at(threshold, name):
        bases = {base: [(rows, 1.0)] for base, rows in found.items()}
        return combine(name, replace(config, strategies=name, threshold=threshold), task, problems, bases)[0][0]

    return at
