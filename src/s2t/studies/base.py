"""Whether the runs of a base folder are what a study would have made there itself; knows no study."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from s2t.config import HOW_IT_RUNS, FitConfig, StudyConfig, build_config
from s2t.errors import ConfigError
from s2t.files import load_run
from s2t.workflows import WORKFLOWS

_EXECUTION = (*HOW_IT_RUNS, "dtype", "device", "device_map", "execution", "trust_remote_code", "batch_size", "out")
_EXECUTION_OF_TRAIN = ("prefix_cache_gib", "checkpoint_steps", "log_with")
_PATHS = ("run", "calibration", "groups")
_FLAGS = {("measure", "limit"): "calibration-limit", ("collect", "limit"): "train-limit"}


def check_base(folder: Path, command: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where a finished run of a base folder has another setting than the study would have given it.

    Where and how fast it ran may differ, and so may what the study leaves to the command; of `train`, whose settings a study can
    give, everything has to agree.
    """
    found = load_run(folder, command)["config"]
    for name, wanted in _wanted(command, settings):
        if name in found and not _is_same(name, found[name], wanted):
            raise ConfigError(
                f"--base {folder.parent} has {name} {found[name]}, not {wanted}, in its {folder.name}; "
                f"{_next_step(command, name, found[name])}."
            )


def _wanted(command: str, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the study would have given, by name, with the defaults of `train`."""
    config = asdict(build_config(WORKFLOWS[command].config, flags=settings))
    ignored = (*_EXECUTION, *_EXECUTION_OF_TRAIN, "llm", "llm_revision", "llm_quantization")
    names = [name for name in config if name not in ignored] if command == "train" else settings
    return ((name, config[name]) for name in names if name not in _EXECUTION)


def _is_same(name: str, found: Any, wanted: Any) -> bool:
    return _last_parts(found) == _last_parts(wanted) if name in _PATHS else found == wanted


def _last_parts(text: Any) -> list[str]:
    """The runs that a setting names, without the folder that they are in, which may have another name by now."""
    return [Path(part.strip().removesuffix("calibration.json")).name for part in str(text).split(",")]


def _next_step(command: str, name: str, found: Any) -> str:
    """How the study's setting could be made that of the base, and what else can be done."""
    of_study = StudyConfig.__dataclass_fields__
    own = command == "train" and (name in FitConfig.__dataclass_fields__ or name not in (*of_study, *_PATHS))
    flag = f"training {name}=" if own else _FLAGS.get((command, name), name).replace("_", "-") + " "
    can_be_given = found is not None and (own or (name in of_study and name not in _PATHS))
    return (f"pass --{flag}{found}, " if can_be_given else "pass ") + "another --base or none"
