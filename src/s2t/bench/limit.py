"""How far each stage is from the hardware: its time over that of its own weight products alone, at the same shapes and dtype.

A stage runs once while every product of a weight with tokens is noted; then the stage and nothing but these products run in
turns in one process. At batch 1 the products are one read of the weights. Attention, norms, LoRAs and Python are what lies above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2t.bench.decode import DecodeBench, local_name
from s2t.bench.timing import Contestant
from s2t.bench.train import TrainBench
from s2t.config import BenchConfig
from s2t.decode.label import label
from s2t.model.half_lora import is_acting

ALONE = " (products)"


@dataclass(slots=True)
class Product:
    """One weight [out, in] that met so many rows; gradients went back through it, or to it as well."""

    weight: Tensor
    rows: int
    is_trained_through: bool
    is_trained: bool = False

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.rows * self.weight.numel() * (1 + self.is_trained_through + self.is_trained)


class Products:
    """The weight products of a stage, in order; `run` does them again on random numbers, and nothing else."""

    def __init__(self, *models: nn.Module) -> None:
        self.models = models
        self.noted: list[Product] = []
        self._inputs: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what the linear layers of the models do inside the block, and what a LoRA does that is being trained."""
        self.noted = []
        hooks = [layer.register_forward_hook(self._note) for model in self.models for layer in _layers(model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        weight = getattr(layer, "base_layer", layer).weight
        rows, is_trained_through = args[0].numel() // weight.shape[1], torch.is_grad_enabled() and args[0].requires_grad
        self.noted.append(Product(weight, rows, is_trained_through))
        if not hasattr(layer, "base_layer") or not output.requires_grad or not is_acting(layer):
            return
        for name in layer.active_adapters:
            down, up = (part[name].weight.detach().to(weight.dtype) for part in (layer.lora_A, layer.lora_B))
            self.noted += [Product(down, rows, is_trained_through, True), Product(up, rows, True, True)]

    @torch.inference_mode()
    def run(self) -> Iterator[object]:
        """All products once, forwards first and then backwards."""
        for product in self.noted:
            F.linear(self._rows(product.rows, product.weight, 1), product.weight)
        for product in reversed(self.noted):
            if product.is_trained_through:
                torch.mm(self._rows(product.rows, product.weight, 0), product.weight)
            if product.is_trained:
                torch.mm(self._rows(product.rows, product.weight, 0).T, self._rows(product.rows, product.weight, 1))
        yield

    def _rows(self, rows: int, weight: Tensor, side: int) -> Tensor:
        key = (rows, weight.shape[side], weight.dtype)
        if key not in self._inputs:
            self._inputs[key] = torch.randn(*key[:2], dtype=weight.dtype, device=weight.device)
        return self._inputs[key]

    @property
    def flops(self) -> float:
        """Multiplications and additions of one run."""
        return sum(one.flops for one in self.noted)


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers, those with a LoRA as a whole."""
    parts = {"base_layer", "lora_A", "lora_B"}
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer") or (isinstance(layer, nn.Linear) and not parts & set(name.split("."))):
            yield layer


class LimitBench:
    """The stages of one `s2t bench limit`, each with its products beside it; `flops` is known once a stage has run."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        largest = max(config.batches)
        self.decode = DecodeBench(replace(config, batch_size=largest, with_transformers=False))
        self.prompts = self.decode.prompts
        self.train = TrainBench(config)
        self.stages: dict[str, Callable[[], Iterator[object]]] = {}
        self.products: dict[str, Products] = {}
        self.counts: dict[str, int] = {}  # tokens of a stage, or groups

    def contestants(self) -> dict[str, Contestant]:
        """Name of a stage -> what runs it once, and beside it its products alone."""
        decode, config = self.decode, self.config
        local = local_name(config.rates[-1])
        runs = decode.contestants()
        slm, adapted = decode.base.model, decode.adapter.base_model
        for size in config.batches:
            count = size * config.max_new_tokens
            self._add(f"rollout, batch {size}", partial(self._at, size, runs["greedy"]), count, slm)
            self._add(f"{local}, batch {size}", partial(self._at, size, runs[local]), count, adapted)
        if decode.llm is not None:
            size = max(config.batches)
            for name, traces in (("s2t drafted", False), ("s2t drafted, with traces", True)):
                run = partial(self._at, size, partial(decode.drafted, traces))
                self._add(f"{name}, batch {size}", run, size * config.max_new_tokens, slm, decode.llm.model)
            self._add("labelling", self._label, self.prompts.numel(), slm, decode.llm.model)
        run = self.train.contestants()["training step"]
        self._add("training step", run, config.groups, self.train.trainer.adapter.base_model)
        both: dict[str, Contestant] = {}
        for name in self.stages:
            both[name] = partial(self._stage, name)
            both[name + ALONE] = self.products[name].run
        return both

    def _add(self, name: str, run: Callable[[], Any], count: int, *models: nn.Module) -> None:
        self.stages[name], self.products[name], self.counts[name] = run, Products(*models), count

    def _stage(self, name: str) -> Iterator[object]:
        """The stage, in one turn; its first run, which warms up, is the one that is noted."""
        products = self.products[name]
        if products.noted:
            yield from self.stages[name]()
            return
        with products.noting():
            yield from self.stages[name]()

    def _at(self, size: int, run: Callable[[], Iterator[object]]) -> Iterator[object]:
        """A decoding stage on the first `size` prompts."""
        self.decode.prompts = self.prompts[:size]
        for _ in run():
            pass
        self.decode.prompts = self.prompts
        yield

    def _label(self) -> Iterator[object]:
        """Label the second half of every prompt, as if it had been generated."""
        assert self.decode.llm is not None
        half = self.prompts.shape[1] // 2
        texts = self.prompts.tolist()
        label(self.decode.base, self.decode.llm, [ids[:half] for ids in texts], [ids[half:] for ids in texts])
        yield
