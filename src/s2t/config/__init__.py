"""One frozen dataclass per command: file and flags become one checked object; each default lives here once.

Flag beats file beats default. An unknown key is an error. The resolved config is saved in the run folder
and the same command accepts it back. Knows no model and reads no problem.
"""

from s2t.config.answer import EvalConfig, GenerateConfig, ServeConfig
from s2t.config.build import build_config, config_dict, parse_settings
from s2t.config.checks import check_effects, check_range, read_variables
from s2t.config.learn import (
    CalibrateConfig,
    CollectConfig,
    DistillConfig,
    ExportConfig,
    FitConfig,
    MeasureConfig,
    MergeConfig,
    PushConfig,
    TrainConfig,
)
from s2t.config.methods import MANY_SAMPLES, METHODS, NEEDS_ADAPTER, NEEDS_LLM, STRATEGIES, TRIGGERED, TRIGGERS, Method
from s2t.config.shared import (
    CRITICALITY_READINGS,
    DISTILLATIONS,
    DIVERGENCES,
    DTYPES,
    EXECUTIONS,
    HOW_IT_RUNS,
    PLACES,
    READERS,
    SCOPES,
    SUPPORTS,
    ChatConfig,
    DecodeConfig,
    EngineConfig,
    ModelConfig,
    RemoteConfig,
    ServedConfig,
    ShardConfig,
    StepConfig,
    TaskConfig,
)
from s2t.config.study import BenchConfig, ReproduceConfig, StudyConfig

__all__ = [
    "CRITICALITY_READINGS",
    "DISTILLATIONS",
    "DIVERGENCES",
    "DTYPES",
    "EXECUTIONS",
    "HOW_IT_RUNS",
    "MANY_SAMPLES",
    "METHODS",
    "NEEDS_ADAPTER",
    "NEEDS_LLM",
    "PLACES",
    "READERS",
    "SCOPES",
    "STRATEGIES",
    "SUPPORTS",
    "TRIGGERED",
    "TRIGGERS",
    "BenchConfig",
    "CalibrateConfig",
    "ChatConfig",
    "CollectConfig",
    "DecodeConfig",
    "DistillConfig",
    "EngineConfig",
    "EvalConfig",
    "ExportConfig",
    "FitConfig",
    "GenerateConfig",
    "MeasureConfig",
    "MergeConfig",
    "Method",
    "ModelConfig",
    "PushConfig",
    "RemoteConfig",
    "ReproduceConfig",
    "ServeConfig",
    "ServedConfig",
    "ShardConfig",
    "StepConfig",
    "StudyConfig",
    "TaskConfig",
    "TrainConfig",
    "build_config",
    "check_effects",
    "check_range",
    "config_dict",
    "parse_settings",
    "read_variables",
]
