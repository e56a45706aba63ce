"""An oracle: fires at the tokens that are known to decide a wrong answer. What a perfect trigger would gain, not a method to use.

`s2t study critical` finds these tokens, after Lin et al. 2024 (arXiv 2411.19943).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s2t.config import DecodeConfig
from s2t.errors import ConfigError, DataError
from s2t.files import read_json
from s2t.methods.base import Round, Trigger


@dataclass
class Critical(Trigger):
    """1 at a critical token of the problem, 0 elsewhere."""

    places: dict[str, list[int]]
    name = "critical"
    default = 0.5
    warmup = 0

    @classmethod
    def of(cls, config: DecodeConfig) -> Critical:
        if config.critical is None:
            raise ConfigError("trigger critical needs --critical, the critical.json that `s2t study critical` wrote.")
        found = read_json(config.critical)
        if not isinstance(found, dict) or not all(isinstance(steps, list) for steps in found.values()):
            raise DataError(
                f"{config.critical} holds no critical tokens; pass the critical.json of `s2t study critical`."
            )
        return cls(found)

    def read(self, round: Round) -> Tensor:
        problems = [key.rpartition("/")[0] for key in round.keys]
        places = zip(problems, round.num_written, strict=True)
        return torch.tensor([float(step in self.places.get(problem, ())) for problem, step in places])
