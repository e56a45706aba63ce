"""How many tokens the SLM drafts before the LLM reads them in one forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

_PRIOR_STEPS = 50  # a row starts as if one flip had been seen in this many steps


@dataclass(frozen=True, slots=True)
class DraftLength:
    """`fixed` tokens, or as many as cost least at the row's own rate of flips; never more than `ceiling`.

    A draft of g tokens costs g SLM forwards and one LLM forward (c SLM forwards) and yields about g - f g^2 / 2 tokens
    at a flip rate f, since only a flip ends it early; the cost per token is least at g = sqrt(c^2 + 2 c / f) - c. The
    output does not depend on g, and g depends on nothing but the row's own steps.
    """

    fixed: int = 0
    cost_ratio: float = 1.0
    ceiling: int = 64

    def at(self, steps: int, flips: int) -> int:
        """Tokens to draft for a row that has written `steps` tokens with `flips` flips among them."""
        if self.fixed:
            return self.fixed
        rate, ratio = (flips + 1) / (steps + _PRIOR_STEPS), self.cost_ratio
        return max(1, min(self.ceiling, round(math.sqrt(ratio**2 + 2 * ratio / rate) - ratio)))
