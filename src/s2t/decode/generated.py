"""One sequence that was written: its tokens, its steps where they are kept, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from s2t.records import Cost, Step


@dataclass(slots=True)
class Generated:
    """One finished sequence; `steps` is filled only when asked for."""

    token_ids: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)
    finish_reason: str = ""
    num_triggered: int = 0
    num_flips: int = 0
    value: float = 0.0
    """Sum of the trigger's readings over the steps."""

    @property
    def mean_value(self) -> float:
        """The trigger's mean reading over the sequence, in its own unit."""
        return self.value / max(len(self.token_ids), 1)

    def add(self, step: Step, keep: bool) -> None:
        """Take the next step; `keep` it whole as well."""
        self.token_ids.append(step.token_id)
        self.num_triggered += step.fired
        self.num_flips += step.flip and step.fired
        self.value += step.value or 0.0
        if keep:
            self.steps.append(step)
        if step.finish_reason is not None:
            self.finish_reason = step.finish_reason
