"""Shards of work to files: in this process, in several local ones, or by actors of a Ray cluster.

What a shard holds never depends on who worked it, nor on how often it had to be begun again: results come back to this
process, which alone writes. Knows nothing of the work.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from s2t.errors import ConfigError, WorkerError, missing_extra
from s2t.progress import progress
from s2t.workers import Workers

S = TypeVar("S")
J = TypeVar("J")
R = TypeVar("R")

_LOSSES = 3
_PASSED_ON = ("S2T_DATA_DIR", "S2T_ALLOW_CODE_EXECUTION", "HF_HOME", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
_PATIENCE_S = 120
_STORE_BYTES = 512 * 2**20


class Places(Protocol):
    """Settings of where the work is done; a run may be resumed with others."""

    @property
    def workers(self) -> int: ...
    @property
    def ray(self) -> str | None: ...
    @property
    def ray_actors(self) -> int | None: ...
    @property
    def ray_gpus(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Shard(Generic[J]):
    """Items whose result goes into one file."""

    path: Path
    index: int
    items: Sequence[J]


def to_files(chunks: Sequence[Sequence[J]], path: Callable[[int], Path]) -> list[Shard[J]]:
    """A shard per chunk; `path` names the file of shard 0, 1, ..."""
    return [Shard(path(i), i, chunk) for i, chunk in enumerate(chunks)]


def open_workers(open: Callable[[], S], places: Places, threads: int = 1) -> Workers[S] | RayWorkers[S]:
    """Whoever works the jobs, by the settings; a context manager. `open` gives the state that each of them works with.

    `threads` jobs at once take turns where the work is done in this process; see `Workers`.
    """
    if places.ray is None:
        return Workers(open, places.workers, threads)
    return RayWorkers(open, places.ray, places.ray_actors, places.ray_gpus)


def write_missing(
    workers: Workers[S] | RayWorkers[S],
    work: Callable[[S, Shard[J]], R],
    shards: Sequence[Shard[J]],
    write: Callable[[Path, R], None],
    title: str,
    shown: bool = True,
) -> None:
    """Work every shard whose file is not there, and write each result as it comes; nothing is opened when none is missing."""
    missing = [shard for shard in shards if not shard.path.exists()]
    if not missing:
        return
    total, left = (sum(len(shard.items) for shard in some) for some in (shards, missing))
    with progress(title, total, total - left, shown) as advance:
        for shard, result in workers.map(work, missing):
            write(shard.path, result)
            advance(len(shard.items))  # of workers elsewhere, who count nothing here


class RayWorkers(Generic[S]):
    """Ray actors that each call `open` once, at their first job; a lost one is replaced and its job begun again.

    `address` is local (a cluster of this machine alone, ended with the block), auto (the running cluster, else local) or that of
    a cluster's head. One job is in flight per actor. `actors` are as many as the cluster has room for where it is None: one
    per `gpus` GPUs, or per CPU where there is no GPU.
    """

    def __init__(
        self, open: Callable[[], S], address: str = "auto", actors: int | None = None, gpus: float = 1.0
    ) -> None:
        self._open, self._address, self._wanted, self._gpus = open, address, actors, gpus
        self._ray: Any = None
        self._actor_class: Any = None
        self._is_ours = False
        self._starting: dict[Any, Any] = {}  # reference of a new actor's sign of life -> actor
        self._idle: list[Any] = []
        self._failed_starts = 0

    def __enter__(self) -> RayWorkers[S]:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ray is None:
            return
        for actor in (*self._idle, *self._starting.values()):
            self._ray.kill(actor)
        if self._is_ours:
            self._ray.shutdown()

    def map(self, work: Callable[[S, J], R], jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        """(job, result) as they get done, in any order; the first error of a job is raised here.

        Raises WorkerError when a job is lost three times with its actor, or actors cannot start.
        """
        if not jobs:
            return
        ray = self._ray or self._connect()
        queue = deque((job, 0) for job in jobs)
        flying: dict[Any, tuple[Any, J, int]] = {}  # reference of a result -> actor, job, how often it was lost
        count = min(self._wanted or 1, len(jobs))
        try:
            while queue or flying:
                while queue and self._idle:
                    job, losses = queue.popleft()
                    actor = self._idle.pop()
                    flying[actor.call.remote(work, job)] = (actor, job, losses)
                for _ in range(min(len(queue), count - len(flying) - len(self._starting))):
                    self._start()
                found, _ = ray.wait([*flying, *self._starting], num_returns=1, timeout=_PATIENCE_S)
                if not found:
                    if not flying:
                        print("no Ray worker has started yet; the cluster may have no room left", file=sys.stderr)
                    continue
                [ready] = found
                if ready in self._starting:
                    self._welcome(ready)
                    continue
                actor, job, losses = flying.pop(ready)
                try:
                    result = ray.get(ready)
                except ray.exceptions.RayTaskError as error:
                    self._idle.append(actor)
                    raise (error.cause if isinstance(error.cause, BaseException) else error) from None
                except ray.exceptions.RayError as error:  # whatever else befalls it: the process, the host, the result
                    ray.kill(actor)
                    queue.append((job, self._note_loss(losses, error)))
                    continue
                self._idle.append(actor)
                yield job, result
        finally:
            for actor, _, _ in flying.values():  # left by an error, or by a reader that stopped
                ray.kill(actor)

    def _start(self) -> None:
        actor = self._actor_class.remote(self._open, os.getcwd(), _settings())
        self._starting[actor.ready.remote()] = actor

    def _welcome(self, sign: Any) -> None:
        """A new actor takes jobs once it lives: one that waits for room in the cluster holds none back."""
        actor = self._starting.pop(sign)
        try:
            self._ray.get(sign)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts >= _LOSSES:
                raise WorkerError(
                    f"Ray could not start a worker {_LOSSES} times; install s2t on every host. Ray says: {_short(error)}"
                ) from error
            return
        self._failed_starts = 0
        self._idle.append(actor)

    def _note_loss(self, losses: int, error: BaseException) -> int:
        if losses + 1 >= _LOSSES:
            raise WorkerError(
                f"a worker died {_LOSSES} times over the same job, of too little memory perhaps; lower --batch-size or "
                f"--ray-actors. Ray says: {_short(error)}"
            ) from error
        print("a Ray worker was lost; its problems are begun again", file=sys.stderr)
        return losses + 1

    def _connect(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise missing_extra("ray", "ray") from error
        if not ray.is_initialized():
            self._is_ours = True
            _join(ray, self._address, self._wanted)
        self._ray = ray
        room = ray.cluster_resources()
        gpus = self._gpus if room.get("GPU", 0) > 0 else 0.0
        if gpus > room.get("GPU", 0):
            raise ConfigError(f"ray_gpus is {gpus}, and the cluster has {room['GPU']:g} GPUs; lower --ray-gpus.")
        fits = int(room["GPU"] / gpus) if gpus else int(room.get("CPU", 1))
        self._wanted = self._wanted or max(1, fits)
        self._actor_class = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(_Actor)
        return ray


def _join(ray: Any, address: str, actors: int | None) -> None:
    """Connect to a cluster, or start one that only this machine can reach; ConfigError when there is none at the address."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster begun here: its actors are this command's own work
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "namespace": "s2t"}
    local: dict[str, Any] = {
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
        "num_cpus": max(os.cpu_count() or 1, actors or 1),
        "object_store_memory": _STORE_BYTES,
    }
    if address == "auto" and "RAY_ADDRESS" not in os.environ:
        try:
            ray.init(address="auto", **quiet)
            return
        except ConnectionError:  # no cluster runs here
            address = "local"
    try:
        ray.init(address=address, **quiet, **(local if address == "local" else {}))
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster at {address!r}: {_short(error)} Start one with `ray start --head`, or pass --ray local."
        ) from error
    except Exception as error:  # what Ray raises, and nothing more special, when its processes take over 30 s to start
        raise WorkerError(f"Ray did not start: {_short(error)} Try again on a less busy machine.") from error


class _Actor:
    """Lives in a worker of the cluster; opens its state at its first job, in the driver's folder where there is such a one."""

    def __init__(self, open: Callable[[], Any], folder: str, settings: Mapping[str, str]) -> None:
        os.environ.update(settings)
        if os.path.isdir(folder):
            os.chdir(folder)
        self._open, self._state = open, None

    def ready(self) -> None:
        """A sign of life."""

    def call(self, work: Callable[[Any, Any], Any], job: Any) -> Any:
        if self._state is None:
            self._state = self._open()
        return work(self._state, job)


def _settings() -> dict[str, str]:
    """What workers read from the environment as this process does; nothing secret."""
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
