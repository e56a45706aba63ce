"""A small random model with an adapter, and hand-made trajectories, for the laws of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from s2t.config import TrainConfig
from s2t.files import RunFolder
from s2t.model.adapter import AdapterConfig, SelectorAdapter
from s2t.model.load import wrap_model
from s2t.model.loaded import LoadedModel
from s2t.train.dataset import GroupData, Trajectory
from s2t.train.trainer import Trainer

torch.set_num_threads(1)  # models this small only lose by sharing cores

VOCAB, NUM_CANDIDATES = 50, 4


def make_model(seed: int = 0) -> LoadedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    vocab = {f"<|reserved_{i - 30}|>" if i >= 30 else f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="w0")), eos_token="w1")
    return wrap_model("random", Qwen2ForCausalLM(config).float(), tokenizer)


def make_trajectories(count: int = 5, num_candidates: int = NUM_CANDIDATES, seed: int = 0) -> list[Trajectory]:
    """Trajectories of different lengths; divergence above 1.0 is a group, never in the 3 warm-up steps."""
    rng = np.random.default_rng(seed)
    made = []
    for place in range(count):
        length = 6 + 3 * place
        divergence = rng.random(length).astype(np.float32) * 1.5
        divergence[4] = 1.25
        steps = np.array([t for t in range(3, length) if divergence[t] > 1.0])
        shape = (len(steps), num_candidates)
        ids = np.array([rng.choice(30, num_candidates, replace=False) for _ in steps]).reshape(shape)
        probs = rng.dirichlet(np.full(num_candidates, 0.5), len(steps)).astype(np.float32)
        logprobs = np.sort(np.log(rng.dirichlet(np.ones(num_candidates), len(steps))), axis=1)[:, ::-1]
        made.append(
            Trajectory(
                problem_id=f"task-{place:016x}",
                template=None,
                prompt_ids=rng.integers(2, 30, 3 + place),
                token_ids=rng.integers(2, 30, length),
                divergence=divergence,
                group_steps=steps,
                candidate_ids=ids,
                slm_logprobs=logprobs.astype(np.float32),
                llm_probs=0.9 * probs,
            )
        )
    return made


def make_data(trajectories: list[Trajectory]) -> GroupData:
    return GroupData(trajectories, 1.0, 3, "task", "train", "random", "llm", "a/b", ())


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return make_trajectories()


@pytest.fixture
def data(trajectories: list[Trajectory]) -> GroupData:
    return make_data(trajectories)


@pytest.fixture
def new_adapter() -> Callable[..., SelectorAdapter]:
    """A random adapter without dropout on a fresh model; `is_fresh` leaves the LoRA as it starts, at zero."""

    def make(scope: str, is_fresh: bool = False, **changes: Any) -> SelectorAdapter:
        loaded = make_model()
        settings = {
            "lora_rank": 3,
            "lora_dropout": 0.0,
            "head_size": 8,
            "num_bins": 8,
            "num_candidates": NUM_CANDIDATES,
        }
        torch.manual_seed(5)
        readout = "rank" if scope in ("step", "rank-stream") else "bins"
        scope = scope.removeprefix("rank-")
        config = AdapterConfig("random", loaded.fingerprint, readout=readout, scope=scope, **(settings | changes))
        adapter = SelectorAdapter(loaded, config)
        with torch.no_grad():
            for name, parameter in adapter.trainable().items():
                if "lora_B" in name and not is_fresh:
                    parameter.normal_(0.0, 0.2)
        return adapter

    return make


@pytest.fixture
def new_trainer(data: GroupData, tmp_path) -> Callable[..., Trainer]:
    def make(adapter: SelectorAdapter, name: str = "run", **settings: Any) -> Trainer:
        settings = {"heldout_problems": 0.0} | settings
        config = TrainConfig(
            readout=adapter.config.readout,
            adapter_scope=adapter.scope,
            num_candidates=NUM_CANDIDATES,
            out=str(tmp_path / name),
            **settings,
        )
        return Trainer(config, data, adapter, RunFolder.open(config.out, "train", config))

    return make
