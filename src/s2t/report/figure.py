"""The canvas that every picture is drawn on: colours, axes, error bars, PNG bytes. Touches no global matplotlib state."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2t.errors import missing_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one appearance: page, text, secondary text, grid, the lines of hit@1, 2, 4, 8, and the ring's parts."""

    paper: str
    ink: str
    muted: str
    grid: str
    lines: tuple[str, str, str, str]
    ring: tuple[str, str, str]


LIGHT = Theme(
    *("#FFFFFF", "#1B1F24", "#57606A", "#E3E6EA"),
    ("#E69F00", "#D55E00", "#CC79A7", "#0072B2"),
    ("#0072B2", "#56B4E9", "#D55E00"),
)
DARK = Theme(
    *("#15181C", "#E6E8EB", "#A3ABB5", "#2C3138"),
    ("#E69F00", "#FF8A3D", "#E3A0C6", "#56B4E9"),
    ("#2F8FD0", "#8FD0F5", "#FF8A3D"),
)


def panels(theme: Theme = LIGHT, count: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty Agg figure with `count` axes side by side, in the theme's colours."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plots") from error

    width = 6.0 if count == 1 else 4.3 * count
    figure = Figure(figsize=(width, 3.9), dpi=190 if count == 1 else 130, layout="constrained", facecolor=theme.paper)
    FigureCanvasAgg(figure)
    found = [figure.add_subplot(1, count, place + 1, facecolor=theme.paper) for place in range(count)]
    for axes in found:
        _dress(axes, theme)
    return figure, found


def _dress(axes: Axes, theme: Theme) -> None:
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, which="both", labelsize=9.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.muted)
    axes.xaxis.label.set(color=theme.ink, size=10.5)
    axes.yaxis.label.set(color=theme.ink, size=10.5)


def png(figure: Figure) -> bytes:
    """The picture as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def span(value: float, ci95: Any) -> tuple[float, float]:
    """Ends of an interval of shares, in percent, around a value in percent; the value itself where there is none."""
    if not ci95:
        return value, value
    return min(value, 100 * ci95[0]), max(value, 100 * ci95[1])


def error_bars(values: Sequence[float], intervals: Sequence[Any]) -> list[list[float]] | None:
    """Lengths below and above each value, in percent; None where no interval is known."""
    if not any(intervals):
        return None
    spans = [span(value, ci95) for value, ci95 in zip(values, intervals, strict=True)]
    below = [value - low for value, (low, _) in zip(values, spans, strict=True)]
    above = [high - value for value, (_, high) in zip(values, spans, strict=True)]
    return [below, above]
