"""Where a training can be watched while it runs: TensorBoard, Weights & Biases or trackio, through accelerate's trackers.

Knows names and numbers, not what they mean. Nothing here is imported unless `--log-with` asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from s2t.errors import ConfigError, missing_extra
from s2t.files import RunFolder

Watch = Callable[[str, Mapping[str, float | None], int], None]
"""Take named numbers of a step: `watch("train", {"loss": 0.7}, 12)`; those that are None are left out."""
PROJECT = "s2t"
FOLDER = "tensorboard"


def check_tracker(name: str | None) -> None:
    """Raise MissingExtraError where the package of a tracker is not installed; None is no tracker."""
    if name is None:
        return
    for package, extra in (("accelerate", "train"), (name, name)):
        if find_spec(package) is None:
            raise missing_extra(package, extra)


@contextmanager
def open_watch(name: str | None, run: RunFolder, step: int, is_first: bool = True) -> Iterator[Watch]:
    """A watch over a run that goes on from `step`; it does nothing without a tracker, or in any process but the first.

    TensorBoard's files go into the run folder, the others' runs into the project `s2t`. Raises ConfigError when the tracker
    cannot be started.
    """
    if name is None or not is_first:
        yield lambda part, values, step: None
        return
    with _accelerate_state():
        tracker = _start(name, run, step)
        try:
            yield lambda part, values, step: tracker.log(_named(part, values), step=step)
        finally:
            tracker.finish()


def _named(part: str, values: Mapping[str, float | None]) -> dict[str, float]:
    return {f"{part}/{key}": value for key, value in values.items() if value is not None}


def _start(name: str, run: RunFolder, step: int) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    settings = {key: value for key, value in run.manifest["config"].items() if value is not None}
    tracker = LOGGER_TYPE_TO_CLASS[name](**_place(name, run, step))
    try:
        tracker.start()
        tracker.store_init_configuration(settings)
    except Exception as error:  # whatever a service raises that is not set up, or cannot be reached
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{name} cannot be started: {reason[:300]}; set it up, or leave --log-with out.") from error
    return tracker


def _place(name: str, run: RunFolder, step: int) -> dict[str, Any]:
    """Where a tracker writes: a resumed run goes on in the place where it began."""
    if name == "tensorboard":
        return {"run_name": FOLDER, "logging_dir": str(run.path), "purge_step": step + 1}
    place = {"run_name": PROJECT, "name": run.path.name, "resume": "allow"}
    if name == "wandb":
        begun = f"{run.path.absolute()} {run.manifest['created']}"
        place["id"] = hashlib.blake2b(begun.encode(), digest_size=8).hexdigest()
    return place


@contextmanager
def _accelerate_state() -> Iterator[None]:
    """What accelerate's trackers ask for; left as it was, so that a later launcher or Accelerator starts afresh."""
    from accelerate import PartialState

    if PartialState._shared_state:
        yield
        return
    state: Any = PartialState(cpu=True)
    try:
        yield
    finally:
        state.destroy_process_group()
        PartialState._reset_state()
