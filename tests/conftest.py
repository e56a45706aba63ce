"""Fixtures of all floors: the embedded pair, and random models of real architectures under its tokenizer."""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports the hub: a test that needs it says so

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("s2t", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("s2t")

VOCAB = 1024
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # far from uniform attention, so that a wrong mask shows
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 128}),  # 128 in all of them
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "gemma": ("Gemma", {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2-eager": (
        "Gemma2",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
        },
    ),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 6}),  # slides in every layer
    "qwen2-sliding": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {
            "num_key_value_heads": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "phi3-longrope": (
        "Phi3",
        {
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0] * 6,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")


@pytest.fixture(scope="session", autouse=True)
def rare_lines() -> Iterator[None]:
    """On a busy machine anything may take seconds: lines of progress come where a test wants them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("s2t.progress._SECONDS_BETWEEN_LINES", 60.0)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of the embedded pair: 1,024 byte-level tokens, 28 of them reserved."""
    from transformers import AutoTokenizer

    from s2t.model.tiny import embedded_path

    return AutoTokenizer.from_pretrained(str(embedded_path("tiny:slm")))


@pytest.fixture(scope="session")
def random_model(tokenizer: Any) -> Callable[..., Any]:
    """Make a two-layer LoadedModel of a family with random weights; the same seed gives the same weights."""
    import torch
    import transformers

    from s2t.model.load import wrap_model

    torch.set_num_threads(1)  # models this small only lose by sharing cores

    def make(family: str = "qwen2", seed: int = 0, dtype: Any = torch.float32, **changes: Any) -> Any:
        name, sizes = FAMILIES[family]
        config = getattr(transformers, f"{name}Config")(**SIZES | sizes | changes)
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        return wrap_model(f"{family}-{seed}", model.to(dtype), tokenizer)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A chromium of the system, driven by Playwright, whose event loop keeps others from running: so not for the session."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install s2t[dev]")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tiny_slm() -> Any:
    """The embedded SLM; shared by all tests, so none may change it."""
    from s2t.model.load import load_model

    return load_model("tiny:slm")


@pytest.fixture(scope="session")
def tiny_llm() -> Any:
    """The embedded LLM; shared by all tests, so none may change it."""
    from s2t.model.load import load_model

    return load_model("tiny:llm")
