"""`s2t calibrate`: thresholds from a measured run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s2t.cli.options import with_options
from s2t.cli.output import print_facts, print_table
from s2t.config import CalibrateConfig


def show(calibration: Mapping[str, Any]) -> None:
    print_table("thresholds", ("trigger", "threshold (nats)"), calibration.get("thresholds", {}).items())
    print_facts("calibrate", calibration)


@with_options(CalibrateConfig, show)
def command(config: CalibrateConfig) -> Any:
    """Turn a measured run of the calibration split into trigger thresholds."""
    from s2t.measure import calibrate

    return calibrate(config)
