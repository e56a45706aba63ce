"""Small random pairs for the laws of decoding: sharp enough that argmax is never a near tie, quick enough to be many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from s2t.config import DecodeConfig
from s2t.decode.loop import Request
from s2t.decode.pair import Pair
from s2t.decode.rows import Generated
from s2t.methods.strategies import Strategy, build_strategy
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import LoadedModel, wrap_model


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
