"""Training: one optimizer step on shared prefixes, random ids, any shape."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np

from s2t.bench.decode import untrained_adapter
from s2t.bench.shapes import open_model
from s2t.bench.timing import Contestant
from s2t.config import BenchConfig, TrainConfig
from s2t.files import RunFolder
from s2t.model.loaded import LoadedModel
from s2t.train.dataset import GroupData, Trajectory, make_batch
from s2t.train.trainer import Trainer


def random_groups(loaded: LoadedModel, prefix: int, num_candidates: int, count: int, seed: int) -> GroupData:
    """One trajectory of `prefix` tokens with `count` groups of K candidates, spread over its second half."""
    rng = np.random.default_rng(seed)
    length = prefix // 2
    steps = np.linspace(0, length, count + 1)[1:].astype(np.int64)
    probs = rng.dirichlet(np.ones(num_candidates), count).astype(np.float32)
    divergence = np.zeros(length + 1, dtype=np.float32)
    divergence[steps] = 1.0
    trajectory = Trajectory(
        "0",
        None,
        rng.integers(4, loaded.vocab_size, prefix - length),
        rng.integers(4, loaded.vocab_size, length + 1),
        divergence,
        steps,
        np.stack([rng.choice(loaded.vocab_size, num_candidates, replace=False) for _ in range(count)]),
        np.log(probs[:, ::-1]),
        probs,
    )
    return GroupData([trajectory], 0.5, 3, "random", "train", loaded.name, "", loaded.fingerprint, ())


class TrainBench:
    """A trainer on random groups whose prefixes have `prompt_tokens` tokens."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        loaded = open_model(config.slm, **config.load_options, seed=config.seed)
        self.data = random_groups(loaded, config.prompt_tokens, config.num_candidates, config.groups, config.seed)
        adapter = untrained_adapter(loaded, config.readout, config.scope)
        settings = TrainConfig(
            readout=config.readout,
            adapter_scope=config.adapter_scope,
            num_candidates=config.num_candidates,
            lora_dropout=0.0,
            prefix_cache_gib=0,
        )
        with tempfile.TemporaryDirectory() as folder:  # a step writes nothing
            run = RunFolder.open(f"{folder}/run", "train", settings)
            self.trainer = Trainer(settings, self.data, adapter, run)
        self.trainer.train_mode()
        self.batch = make_batch(self.data.trajectories, self.data.threshold, self.data.warmup_steps, loaded.device)

    def contestants(self) -> dict[str, Contestant]:
        """Name -> what runs it once."""
        return {"training step": self._step}

    def _step(self) -> Iterator[object]:
        self.loss = self.trainer.one_step(self.batch)["loss"]
        yield
