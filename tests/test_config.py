"""The config floor: flag beats file beats default, and what does not fit is refused in one line."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from s2t import config as all_configs
from s2t.cli.options import field_docs
from s2t.config import (
    CalibrateConfig,
    CollectConfig,
    EvalConfig,
    GenerateConfig,
    MeasureConfig,
    ServeConfig,
    TrainConfig,
    build_config,
    config_dict,
)
from s2t.errors import ConfigError, S2TError

CONFIGS = [CalibrateConfig, CollectConfig, EvalConfig, GenerateConfig, MeasureConfig, ServeConfig, TrainConfig]

SHARED = ("TaskConfig",)  # of no command by itself
SEEDED = [
    cls
    for name, cls in vars(all_configs).items()
    if "seed" in getattr(cls, "__dataclass_fields__", {}) and name not in SHARED
]


def write(path, value) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.mark.parametrize("cls", CONFIGS)
def test_defaults_are_valid(cls):
    assert build_config(cls) == cls()


def test_flag_beats_file_beats_default(tmp_path):
    file = write(tmp_path / "c.json", {"limit": 7, "quantile": 0.9})
    config = build_config(MeasureConfig, file, {"limit": 9, "seed": None})
    assert (config.limit, config.quantile, config.seed) == (9, 0.9, MeasureConfig().seed)


def test_a_flag_equal_to_the_default_still_beats_the_file(tmp_path):
    file = write(tmp_path / "c.json", {"limit": 7})
    assert build_config(MeasureConfig, file, {"limit": MeasureConfig().limit}).limit == MeasureConfig().limit


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_saved_config_is_accepted_back(cls, tmp_path):
    config = replace(cls(), **({"seed": 3} if "seed" in {item.name for item in fields(cls)} else {}))
    for name, saved in (
        ("config", config_dict(config)),
        ("manifest", {"command": "x", "config": config_dict(config)}),
    ):
        assert build_config(cls, write(tmp_path / f"{name}.json", saved)) == config


@pytest.mark.parametrize("cls", SEEDED)
def test_a_negative_seed_is_refused_before_anything_runs(cls):
    with pytest.raises(ConfigError, match="seed must be at least 0; got -1"):
        build_config(cls, flags={"seed": -1})


@pytest.mark.parametrize("key", ["num_candidate", "slm_path"])
def test_an_unknown_key_is_named(key, tmp_path):
    with pytest.raises(ConfigError, match=key):
        build_config(GenerateConfig, write(tmp_path / "c.json", {key: 1}))


@pytest.mark.parametrize("text", ["{", "[1, 2]", '"text"'])
def test_a_file_that_is_no_json_object_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"c\.json"):
        build_config(GenerateConfig, write(tmp_path / "c.json", text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"c\.json is not JSON"):
        build_config(GenerateConfig, path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        build_config(GenerateConfig, tmp_path / "none.json")


@pytest.mark.parametrize(
    ("cls", "flags"),
    [
        (GenerateConfig, {"strategy": "magic"}),
        (GenerateConfig, {"trigger": "magic"}),
        (GenerateConfig, {"num_candidates": 0}),
        (GenerateConfig, {"temperature": 0.0}),
        (GenerateConfig, {"top_p": 1.5}),
        (GenerateConfig, {"dtype": "int3"}),
        (GenerateConfig, {"max_new_tokens": 0}),
        (GenerateConfig, {"warmup_steps": -1}),
        (GenerateConfig, {"num_samples": 0}),
        (MeasureConfig, {"limit": 0}),
        (MeasureConfig, {"quantile": 1.5}),
        (MeasureConfig, {"quantile": float("nan")}),
        (MeasureConfig, {"warmup_steps": -1}),
        (MeasureConfig, {"divergence": "magic"}),
        (CalibrateConfig, {"quantile": -0.1}),
        (CollectConfig, {"policy": "llm"}),
        (CollectConfig, {"heldout_templates": 1.0}),
        (CollectConfig, {"max_new_tokens": 0}),
        (CollectConfig, {"temperature": 0.0}),
        (CollectConfig, {"policy": "s2t-local"}),
        (TrainConfig, {"adapter_scope": "everywhere"}),
        (TrainConfig, {"num_bins": 1}),
        (TrainConfig, {"learning_rate": 0.0}),
        (TrainConfig, {"head_size": 0}),
        (TrainConfig, {"checkpoint_steps": 0}),
        (TrainConfig, {"warmup_ratio": 1.1}),
        *((TrainConfig, {f"{loss}_weight": -0.1}) for loss in ("ce", "pairwise", "listwise", "lm", "criticality")),
        (EvalConfig, {"strategies": "greedy,magic"}),
        (EvalConfig, {"strategies": " , "}),
        (EvalConfig, {"strategies": "greedy,greedy"}),
        (EvalConfig, {"num_traces": -1}),
    ],
)
def test_a_value_out_of_range_is_one_line_of_usage(cls, flags):
    with pytest.raises(ConfigError) as raised:
        build_config(cls, flags=flags)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("limit", "many", "a whole number"),
        ("limit", 2.5, "a whole number"),
        ("limit", True, "a whole number"),
        ("limit", None, "a whole number"),
        ("quantile", "0.9", "a number"),
        ("quantile", False, "a number"),
        ("threshold", [1], "a number or null"),
        ("slm", 3, "text"),
        ("llm", {}, "text or null"),
        ("trust_remote_code", 1, "true or false"),
    ],
)
def test_a_value_of_another_kind_says_what_was_expected_and_what_came(name, value, expected, tmp_path):
    with pytest.raises(ConfigError) as raised:
        build_config(MeasureConfig, write(tmp_path / "c.json", {name: value}))
    assert str(raised.value) == f"{name} must be {expected}; got {value!r}."


def test_a_whole_number_stands_for_a_float_and_null_for_what_may_be_missing(tmp_path):
    file = write(tmp_path / "c.json", {"quantile": 1, "threshold": None, "llm": None})
    config = build_config(MeasureConfig, file)
    assert (config.quantile, config.threshold, config.llm) == (1.0, None, None)
    assert isinstance(config.quantile, float)


def test_collecting_with_s2t_local_is_accepted_once_there_is_an_adapter():
    assert CollectConfig(policy="s2t-local", adapter="runs/train/adapter").policy == "s2t-local"


def test_a_loss_may_be_switched_off():
    weights = TrainConfig(readout="bins", ce_weight=0, pairwise_weight=0, lm_weight=0).selection_weights
    assert weights == {"ce": 0, "pairwise": 0, "listwise": 0.1}


def test_each_readout_has_scopes_and_losses_of_its_own():
    assert (TrainConfig().readout, TrainConfig().scope) == ("rank", "step")
    assert TrainConfig(readout="bins").scope == "candidates"
    assert TrainConfig().selection_weights == {"ce": 0.0, "listwise": 1.0}
    with pytest.raises(ConfigError, match="readout rank has scope step or stream; got 'always'"):
        TrainConfig(adapter_scope="always")
    with pytest.raises(ConfigError, match="pairwise_weight is of readout bins"):
        TrainConfig(pairwise_weight=1.0)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_setting_is_explained_beneath_it(cls):
    docs = field_docs(cls)
    for item in fields(cls):
        assert docs.get(item.name, "").strip(), f"{cls.__name__}.{item.name} has no string beneath it"


def test_eval_knows_strategies_alone():
    assert "strategy" not in {item.name for item in fields(EvalConfig)}


def test_strategy_names_ignore_spaces():
    assert EvalConfig(strategies="greedy, s2t-local,").strategy_names == ("greedy", "s2t-local")


def test_every_config_error_is_an_error_of_ours():
    assert issubclass(ConfigError, S2TError)


@pytest.mark.parametrize(
    ("strategies", "units"),
    [
        ("takeover,s2t-local", "divergence and criticality"),
        ("s2t@entropy,s2t@random", "entropy and random"),
        ("r2r,smart", "r2r and smart"),
    ],
)
def test_one_threshold_for_readings_of_different_units_is_refused(strategies, units):
    with pytest.raises(ConfigError, match=f"{units}, whose units differ"):
        EvalConfig(strategies=strategies, threshold=0.5, llm="tiny:llm")
    EvalConfig(strategies=strategies, llm="tiny:llm")
    EvalConfig(strategies="greedy,takeover,s2t", threshold=0.5, llm="tiny:llm")
