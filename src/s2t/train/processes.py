"""The processes of one training run: this one alone, or several that `accelerate launch` (or torchrun) started.

Each works its share of every batch, and what they sum is what one process would have computed. With FSDP the weights are
sharded over them, too, and come together layer by layer. Knows nothing of losses and examples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from s2t.config import ModelConfig
from s2t.errors import ConfigError
from s2t.files import RunFolder

T = TypeVar("T")

_NEEDED = (  # what `accelerate launch` puts into the environment, the value that trains as one process does, and its flag
    (
        "ACCELERATE_MIXED_PRECISION",
        "no",
        "--mixed_precision no (--dtype of s2t is the base model's; the adapter is float32)",
    ),
    ("ACCELERATE_DYNAMO_BACKEND", "no", "--dynamo_backend no"),
    ("ACCELERATE_USE_DEEPSPEED", "false", "--use_fsdp in place of --use_deepspeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "false", "--use_fsdp in place of --use_megatron_lm"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "false", "no --use_parallelism_config"),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        "1",
        "--gradient_accumulation_steps 1 (batches are cut as s2t cuts them)",
    ),
)
_NEEDED_FSDP = (
    ("FSDP_VERSION", "2", "--fsdp_version 2"),
    ("FSDP_OFFLOAD_PARAMS", "false", "--fsdp_offload_params false"),
    (
        "FSDP_ACTIVATION_CHECKPOINTING",
        "false",
        "--fsdp_activation_checkpointing false (a layer read again would write its keys and values twice)",
    ),
)


@dataclass(frozen=True, slots=True)
class Processes:
    """Number `index` of `count`, on `device`; alone, the settings' own device counts."""

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.index == 0

    def load_options(self, config: ModelConfig) -> dict[str, Any]:
        """Where and how this process loads its copy of the SLM; ConfigError for what cannot be shared."""
        options = config.load_options
        if self.device is None:
            return options
        if config.device_map is not None or config.device not in ("auto", "cpu", "cuda"):
            raise ConfigError("every process has a device of its own; leave --device and --device-map out.")
        if self.is_sharded and config.quantization is not None:
            raise ConfigError(
                "FSDP cannot shard quantized weights; launch without --use_fsdp, or leave --quantization out."
            )
        return options | {
            "device": "cpu" if self.is_sharded else str(self.device)
        }  # sharded weights move shard by shard

    def open_run(self, path: str | Path, command: str, config: Any, ignore: tuple[str, ...] = ()) -> RunFolder:
        """The run folder, made or checked by the first process alone."""
        if self.count == 1:
            return RunFolder.open(path, command, config, ignore)
        found = [RunFolder.open(path, command, config, ignore).manifest if self.is_first else None]
        distributed.broadcast_object_list(found, src=0, device=self.device)
        return RunFolder(Path(path), found[0] or {})

    def share(self, chosen: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """This process's part of a batch, in the batch's order; the parts have about the same total size."""
        parts: list[list[int]] = [[] for _ in range(self.count)]
        held = [0] * self.count
        for place in sorted(range(len(chosen)), key=lambda place: -sizes[chosen[place]]):
            lightest = held.index(min(held))
            parts[lightest].append(place)
            held[lightest] += sizes[chosen[place]]
        return [chosen[place] for place in sorted(parts[self.index])]

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes, name by name; every process must have the same names."""
        if self.count == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def gather(self, tensors: Sequence[Tensor]) -> None:
        """Put together, in place, tensors of which each process filled a part and left zeros elsewhere."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def enter(self, whole: Whole, decoder: Any) -> nn.Module:
        """The module through which all work on the weights has to go; FSDP shards the decoder's layers one by one.

        The parameters of sharded modules are new objects afterwards.
        """
        if self.count == 1:
            return whole
        if not self.is_sharded:
            return nn.parallel.DistributedDataParallel(whole)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        assert self.device is not None
        mesh = init_device_mesh(self.device.type, (self.count,))
        is_freed = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
        for layer in decoder.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=is_freed)
        fully_shard(whole, mesh=mesh)  # in place
        return whole


class Whole(nn.Module):
    """Everything with weights, under one forward that does any work on it: where FSDP and DDP put their hooks.

    Code in it may call any part (the decoder without its head, twice, under another adapter state): weights of the root are
    there until the work is done, and every layer brings its own.
    """

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, work: Callable[..., T], *arguments: Any) -> T:
        return work(*arguments)


@contextmanager
def open_processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that a launcher started this one among, joined for the block; this one alone without a launcher.

    Each gets a GPU of its own, or the CPU where `device` or the launcher says so or there is no GPU. Raises ConfigError for
    settings of the launcher under which the losses would not be those of one process.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name, value, flag in (*_NEEDED, *(_NEEDED_FSDP if is_sharded else ())):
        if os.environ.get(name, value).lower() != value:
            raise ConfigError(f"the launcher set {name}={os.environ[name]}; s2t trains with {flag}.")
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # every process reads the weights, and fingerprints them
    from accelerate import PartialState

    is_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    state: Any = PartialState(cpu=is_cpu or not torch.accelerator.is_available())
    try:
        if state.num_processes != count:
            raise ConfigError(f"the launcher started {count} processes, and {state.num_processes} found each other.")
        place = torch.device("cpu") if state.device.type == "cpu" else state.device
        yield Processes(state.process_index, count, place, is_sharded)
    finally:
        state.destroy_process_group()
        PartialState._reset_state()


def is_first_process() -> bool:
    """Whether this process speaks for all that a launcher started; known before they are joined."""
    return os.environ.get("RANK", "0") == "0"


def full(tensor: Tensor) -> Tensor:
    """A copy of a parameter or of its optimizer state on the CPU, put together from all processes, which must all ask."""
    from torch.distributed.tensor import DTensor

    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor as a parameter holds it: this process's shard of it under FSDP."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
