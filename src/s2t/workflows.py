"""The table of workflows, and each as a plain function: the settings of its command as keywords, its result as a dictionary.

The command line, these functions, recipes and studies all start a workflow from here. Each writes a run folder and resumes it
when it is called again: that is how a killed demo, recipe or study goes on. `docs/cli.md` lists the settings and their
defaults; a setting that is unknown or out of range raises ConfigError.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from s2t.config import (
    BenchConfig,
    CalibrateConfig,
    CollectConfig,
    DistillConfig,
    EvalConfig,
    ExportConfig,
    MeasureConfig,
    MergeConfig,
    PushConfig,
    RouterConfig,
    TrainConfig,
    build_config,
)


@dataclass(frozen=True, slots=True)
class Workflow:
    """One workflow: its settings, what runs it (module:function, imported when it runs), and what it does in a line."""

    config: type[Any]
    run: str
    about: str
    is_stage: bool = False
    """Whether it can be a stage of a recipe."""
    is_shared: bool = False
    """Whether several processes may run it together, of which the first one prints."""

    def start(self, config: Any) -> Any:
        """Run it with checked settings."""
        module, _, name = self.run.partition(":")
        return getattr(import_module(module), name)(config)

    def __call__(self, **settings: Any) -> dict[str, Any]:
        """Check the settings and run it."""
        return self.start(build_config(self.config, flags=settings))


WORKFLOWS = {
    "measure": Workflow(
        MeasureConfig,
        "s2t.measure:measure",
        "Measure how often the LLM's token is among the SLM's first K where the two disagree.",
        is_stage=True,
    ),
    "calibrate": Workflow(
        CalibrateConfig,
        "s2t.measure:calibrate",
        "Turn a measured run of the calibration split into trigger thresholds.",
        is_stage=True,
    ),
    "collect": Workflow(
        CollectConfig,
        "s2t.collect:collect",
        "Collect selection groups for training, shard by shard; rerunning resumes.",
        is_stage=True,
    ),
    "train": Workflow(
        TrainConfig,
        "s2t.train.trainer:train",
        "Train the selector adapter on collected groups; rerunning resumes.",
        is_stage=True,
        is_shared=True,
    ),
    "train-router": Workflow(
        RouterConfig,
        "s2t.train.small:train",
        "Train the router of strategy r2r, or the forecasts of zip-rc, on outcomes of answers; rerunning resumes.",
        is_stage=True,
    ),
    "distill": Workflow(
        DistillConfig,
        "s2t.train.distill:distill",
        "Distil the LLM into a LoRA of the SLM, the baseline to compare selection with; rerunning resumes.",
        is_stage=True,
        is_shared=True,
    ),
    "eval": Workflow(
        EvalConfig,
        "s2t.evaluate:evaluate",
        "Grade strategies on the same problems: accuracy, intervals, paired tests, cost.",
        is_stage=True,
    ),
    "merge": Workflow(
        MergeConfig,
        "s2t.merge:merge",
        "Merge an adapter and its base model into one folder that loads like any causal LM.",
    ),
    "export": Workflow(
        ExportConfig,
        "s2t.export:export",
        "Write an adapter and its base model as a folder of GGUF files, which llama.cpp runs on a laptop.",
    ),
    "push": Workflow(
        PushConfig,
        "s2t.push:push",
        "Upload an adapter to the Hugging Face hub, private unless --public, to be named OWNER/NAME from then on.",
    ),
    "bench": Workflow(
        BenchConfig,
        "s2t.bench:bench",
        "Time decoding, collecting or training, each against a baseline of the same run.",
    ),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One workflow of a chain with its settings, and the numbers that were published for it (per cent, by name).

    Chains (the demo, recipes, studies) run their stages one after the other; a finished one is read from its folder.
    """

    name: str
    command: str
    settings: dict[str, Any]
    published: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Run it, or go on with it."""
        return WORKFLOWS[self.command](**self.settings)

    @property
    def line(self) -> str:
        """The stage as a shell command."""
        words = ["s2t", self.command]
        for key, value in self.settings.items():
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                words.append(flag if value else f"--no-{flag[2:]}")
                continue
            for one in value if isinstance(value, list) else [value]:
                words += [flag, json.dumps(one) if isinstance(one, dict) else str(one)]
        return shlex.join(words)


def measure(**settings: Any) -> dict[str, Any]:
    """Local sufficiency of a pair on problems: measure.json. Source: arXiv 2604.26940, hit rate at divergence points."""
    return WORKFLOWS["measure"](**settings)


def calibrate(**settings: Any) -> dict[str, Any]:
    """A measured run of the calibration split becomes thresholds: calibration.json."""
    return WORKFLOWS["calibrate"](**settings)


def collect(**settings: Any) -> dict[str, Any]:
    """Problems of the train split become selection groups in parquet shards; returns their counts."""
    return WORKFLOWS["collect"](**settings)


def train(**settings: Any) -> dict[str, Any]:
    """Selection groups become an adapter, in the run folder's `adapter`; returns train.json."""
    return WORKFLOWS["train"](**settings)


def train_router(**settings: Any) -> dict[str, Any]:
    """Outcomes of answers become the router of r2r, in the run folder's `router`, or the forecasts of zip-rc, in `forecast`."""
    return WORKFLOWS["train-router"](**settings)


def distill(**settings: Any) -> dict[str, Any]:
    """The LLM's answers or distributions become a LoRA of the SLM, in the run folder's `adapter`; returns distill.json."""
    return WORKFLOWS["distill"](**settings)


def evaluate(**settings: Any) -> dict[str, Any]:
    """Problems x strategies become graded results; returns summary.json: accuracies with intervals, paired tests, costs."""
    return WORKFLOWS["eval"](**settings)
