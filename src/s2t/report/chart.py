"""The picture of a study: lines with intervals against a number, or bars with intervals; PNG bytes.

Takes plain JSON values, as study.json holds them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from s2t.report.figure import LIGHT, Theme, error_bars, panels, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A51A3", "#8C8C8C", "#1B1F24")
_MARKERS = "osD^vPX*<>ph"
_LETTER, _MARK, _LINE = 0.075, 0.5, 0.2  # of a legend: a letter's width, what stands beside a name, a line; inches


def draw_charts(charts: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """One chart, or several of lines side by side; PNG bytes.

    A chart has x_label, y_label, series (name, x, y in [0, 1], ci95), kind (line or bar) and log_x. ValueError for bars
    among several.
    """
    kinds = [chart["kind"] for chart in charts]
    if kinds == ["bar"]:
        return _bars(charts[0], theme)
    if "bar" in kinds:
        raise ValueError("bars stand alone; got several charts.")
    figure, places = panels(theme, len(charts))
    for chart, axes in zip(charts, places, strict=True):
        _lines(chart, axes, theme, columns=1 if len(charts) > 1 and len(chart["series"]) < 7 else 2)
    return png(figure)


def _lines(chart: dict[str, Any], axes: Axes, theme: Theme, columns: int) -> None:
    """Lines with intervals, the legend above them; a word in the middle where there is no line."""
    for place, series in enumerate(chart["series"]):
        style: dict[str, Any] = {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)]}
        y = [100 * value for value in series["y"]]
        if len(y) > 50:
            axes.plot(series["x"], y, color=style["color"], linewidth=2, label=series["name"])
            continue
        bars = error_bars(y, series["ci95"])
        axes.errorbar(series["x"], y, yerr=bars, markersize=6, linewidth=1.8, capsize=3, label=series["name"], **style)
    if chart["log_x"]:
        _log_axis(axes, [x for series in chart["series"] for x in series["x"]])
    axes.set_xlabel(chart["x_label"])
    axes.set_ylabel(chart["y_label"])
    if not chart["series"]:
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", va="center", color=theme.muted)
        return
    if len(chart["series"]) <= 2 and columns > 1:
        columns = len(chart["series"])
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = figure.get_size_inches()
    if max((_LETTER * len(series["name"]) + _MARK for series in chart["series"]), default=0.0) * columns > width:
        columns = 1  # names side by side would leave the picture at both ends
        figure.set_size_inches(width, height + _LINE * max(0, len(chart["series"]) - 3))
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, frameon=False, labelcolor=theme.ink, fontsize=9
    )


def _bars(chart: dict[str, Any], theme: Theme) -> bytes:
    """Horizontal bars, first on top, with the interval and the value beside each."""
    series = chart["series"]
    figure, [axes] = panels(theme)
    figure.set_size_inches(7.0, max(2.2, 0.34 * len(series) + 1.0))
    values = [100 * one["y"][0] for one in series]
    errors = error_bars(values, [interval for one in series for interval in (one["ci95"] or [None])])
    places = list(range(len(series)))
    axes.barh(places, values, color=_COLORS[0], alpha=0.85, height=0.7)
    axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=theme.ink, capsize=3, linewidth=1.2)
    right = [value + (errors[1][i] if errors else 0) for i, value in enumerate(values)]
    for place, value, edge in zip(places, values, right, strict=True):
        axes.annotate(
            f"{value:.1f}", (max(edge, 0), place), (6, 0), textcoords="offset points", va="center", color=theme.ink
        )
    axes.set_yticks(places, [one["name"] for one in series])
    axes.invert_yaxis()
    left = [value - (errors[0][i] if errors else 0) for i, value in enumerate(values)]
    axes.set_xlim(min(0, min(left, default=0) * 1.15), max(right, default=1) * 1.15 + 1)
    axes.set_xlabel(chart["y_label"])
    return png(figure)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A log axis whose ticks are the values themselves where they are few, thinned where they crowd; 0 has no place on it."""
    axes.set_xscale("log")
    ticks: list[float] = []
    shown = sorted({value for value in values if value > 0})
    span = math.log(shown[-1] / shown[0]) if shown else 1.0
    for value in shown:
        if not ticks or math.log(value / ticks[-1]) > 0.09 * span:
            ticks.append(value)
    axes.set_xticks(ticks, [_short(value) for value in ticks])
    axes.minorticks_off()


def _short(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
