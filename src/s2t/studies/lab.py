"""The runs that studies are made of: measured, calibrated, collected, trained and evaluated once, and shared.

A folder that holds finished runs of the same pair (such as `runs/demo`) serves as the base where its settings are those of
the study; what it lacks is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s2t.config import PLACES, ModelConfig, StudyConfig, parse_settings
from s2t.demo import TRAIN_SETTINGS
from s2t.files import RunFolder, read_json, write_json
from s2t.model.merged import base_model
from s2t.model.tiny import is_embedded
from s2t.studies.base import check_base
from s2t.workflows import Stage

NETWORK_PROBLEMS = 2304
"""Training problems of routers and forecasts at most, of which each is written several times."""


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: points with 95 % intervals where they are known."""

    name: str
    x: list[float]
    y: list[float]
    ci95: list[tuple[float, float] | None] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Chart:
    """What the picture of a study shows; `kind` is line (numeric x) or bar (one point per series, no x)."""

    x_label: str
    y_label: str
    series: list[Series]
    kind: str = "line"
    log_x: bool = False
    percent_y: bool = True


@dataclass(frozen=True, slots=True)
class Findings:
    """A study's table and chart (several of lines stand side by side).

    Rows are plain values, shares in [0, 1] under a column whose name ends in %.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    chart: Chart | list[Chart]
    notes: list[str] = field(default_factory=list)


class Lab:
    """Runs workflows for one study; every method returns the folder of a finished run."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.folder = Path(config.out)
        self.base = Path(config.base) if config.base is not None else self.folder / "base"

    @property
    def models(self) -> dict[str, Any]:
        """Settings that load the pair."""
        return {name: getattr(self.config, name) for name in ModelConfig.__dataclass_fields__}

    @property
    def problems(self) -> dict[str, Any]:
        """Settings of whatever reads problems."""
        config = self.config
        names = ("task", "prompt", "chat_template_kwargs", "seed", *PLACES, "max_new_tokens", "batch_size")
        return {name: getattr(config, name) for name in names}

    def settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a run over the study's problems and models, `own` before them; the shared ones are the study's."""
        return self._settings(own)

    def _settings(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of a run over problems, `own` before the study's; the revision is that of the study's SLM alone."""
        is_other = own.get("slm", self.config.slm) != self.config.slm
        return {**self.models, **self.problems, **({"revision": None} if is_other else {}), **own}

    def measured(self, name: str = "measure", **settings: Any) -> Path:
        """A measured run; by default of the calibration split, in the base folder."""
        own = {"limit": self.config.calibration_limit, "quantile": self.config.quantile}
        return self._run("measure", self._place(name, "measure"), self._settings(own | settings))

    def calibrated(self) -> Path:
        """Thresholds of the pair."""
        run = self.measured()
        return self._run(
            "calibrate", self._place("calibrate", "calibrate"), {"run": run, "quantile": self.config.quantile}
        )

    def thresholds(self) -> dict[str, float]:
        """Thresholds of the pair, by trigger."""
        return read_json(self.calibrated() / "calibration.json")["thresholds"]

    def collected(self, name: str = "collect", **settings: Any) -> Path:
        """Selection groups of training problems."""
        own = {"limit": self.config.train_limit, "calibration": self.calibrated(), "policy": "s2t"}
        return self._run("collect", self._place(name, "collect"), self._settings(own | settings))

    def trained(self, name: str = "train", groups: Path | None = None, **settings: Any) -> Path:
        """An adapter's folder."""
        place = self._place(name, "train")
        is_finished = _is_finished(place, "train")
        if not is_finished or place.parent == self.base:
            models = {key: value for key, value in self.models.items() if not key.startswith("llm")}
            known = self._place("collect", "collect") if is_finished else None  # of a base that has an adapter alone
            own = {"groups": groups or known or self.collected(), "seed": self.config.seed}
            self._run("train", place, models | own | self.training | settings)
        return place / "adapter"

    def adapted(self) -> Path:
        """The adapter that was given, else one that is trained."""
        return Path(self.config.adapter) if self.config.adapter is not None else self.trained()

    def distilled(self, name: str, **settings: Any) -> Path:
        """A distilled SLM's folder."""
        own = {"limit": self.config.train_limit}
        return self._run("distill", self.folder / name, self._settings(own | settings)) / "adapter"

    def routed(self) -> Path:
        """A trained router's run."""
        limit = min(self.config.train_limit, NETWORK_PROBLEMS)
        own = {"limit": limit, "calibration_limit": self.config.calibration_limit}
        return self._run("train-router", self.folder / "router", self._settings(own))

    def foretold(self) -> Path:
        """A run of forecasts for zip-rc."""
        own = {"method": "zip-rc", "limit": min(self.config.train_limit, NETWORK_PROBLEMS)}
        return self._run("train-router", self.folder / "forecast", self._settings(own))

    @property
    def training(self) -> dict[str, Any]:
        """Settings of `s2t train`: those that were given, else those that suit the embedded models, else the defaults."""
        if self.config.training is not None:
            return parse_settings(self.config.training)
        return TRAIN_SETTINGS if is_embedded(base_model(self.config.slm, self.config.revision)) else {}

    def evaluated(self, name: str, strategies: str, **settings: Any) -> dict[str, Any]:
        """summary.json of an evaluation, with the results as `results`."""
        own = {"limit": self.config.limit, "strategies": strategies, "split": self.config.split, "num_traces": 0}
        folder = self._run("eval", self.folder / name, self._settings(own | settings))
        return read_json(folder / "summary.json")

    def thresholds_file(self, name: str, thresholds: Mapping[str, float]) -> Path:
        """A calibration.json made of some thresholds."""
        path = self.folder / f"{name}.json"
        write_json(path, {"thresholds": dict(thresholds)})
        return path

    def _place(self, name: str, command: str) -> Path:
        """Where a run is: the base folder for those that every study shares, else the study's own."""
        is_shared = name == command
        return (self.base if is_shared else self.folder) / name

    def _run(self, command: str, folder: Path, settings: Mapping[str, Any]) -> Path:
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        if folder.parent == self.base and _is_finished(folder, command):
            check_base(folder, command, plain)
        else:
            Stage(folder.name, command, {**plain, "out": str(folder)}).run()
        return folder


def _is_finished(folder: Path, command: str) -> bool:
    path = folder / "manifest.json"
    if not path.is_file():
        return False
    manifest = read_json(path)
    return manifest.get("command") == command and manifest.get("status") == "complete"


def open_run(config: StudyConfig) -> RunFolder:
    """The study's run folder; the same settings go on, others are refused."""
    return RunFolder.open(config.out, "study", config, ignore=PLACES)
