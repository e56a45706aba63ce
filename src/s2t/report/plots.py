"""Pictures of a run as PNG bytes: ranks of the LLM's token, hit@K, hit rate by divergence, accuracy against cost.

Each drawing takes plain JSON values and a theme and touches no file and no global matplotlib state.
Colours are Okabe-Ito's, and every strategy also has a marker of its own, so colour is never the only cue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from s2t.report.figure import LIGHT, Theme, error_bars, panels, png, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

HIT_BY_DIVERGENCE_KS = ("1", "2", "4", "8")

_STYLES = {  # strategy -> (colour, marker); "" is the theme's ink
    "greedy": ("#8C8C8C", "o"),
    "sample": ("#56B4E9", "v"),
    "self-consistency": ("#CC79A7", "^"),
    "llm": ("", "*"),
    "takeover": ("#E69F00", "s"),
    "s2t": ("#D55E00", "D"),
    "s2t-local": ("#009E73", "P"),
}
_OTHER_STYLE = ("#8C8C8C", "X")
_ANGLES = (0, 180, 40, -40, 140, -140, 90, -90)  # degrees, in the order they are tried
_RADII = (12, 20, 30, 44, 60, 80, 105, 135, 170, 210, 260)  # points


_CENTERED: dict[str, Any] = {"ha": "center", "va": "center"}
RANKS = ("rank 1: the SLM's own token", "rank 2 to 8: there to be selected", "rank 9 or later: out of reach")


def rank_shares(hit_rate: dict[str, Any]) -> tuple[float, float, float] | None:
    """Shares of the LLM's tokens at rank 1, 2 to 8, and 9 or later of the SLM's order; None without hit@1 and hit@8."""
    if not _is_number(hit_rate.get("1")) or not _is_number(hit_rate.get("8")):
        return None
    first, eight = float(hit_rate["1"]), float(hit_rate["8"])
    return first, eight - first, 1 - eight


def rank_ring(shares: Sequence[float], num_points: int | None, theme: Theme = LIGHT) -> bytes:
    """A ring of the `rank_shares`, clockwise from the top, with the number of points in its middle; PNG bytes.

    Source: Select to Think (arXiv 2604.26940), local sufficiency at divergence points.
    """
    figure, [axes] = panels(theme)
    axes.set_axis_off()
    axes.pie(
        list(shares),
        center=(-1.15, 0),
        radius=1,
        startangle=90,
        counterclock=False,
        colors=theme.ring,
        wedgeprops={"width": 0.36, "edgecolor": theme.paper, "linewidth": 2.5},
    )
    axes.text(-1.15, 0, _points_text(num_points), fontsize=12, color=theme.ink, **_CENTERED, linespacing=1.35)
    for place, (share, label) in enumerate(zip(shares, RANKS, strict=True)):
        _ring_label(axes, 0.66 - 0.66 * place, share, label, theme.ring[place], theme)
    axes.set(xlim=(-2.2, 2.2), ylim=(-1.08, 1.08), aspect="equal")
    return png(figure)


def _points_text(num_points: int | None) -> str:
    return "divergence\npoints" if num_points is None else f"{num_points:,}\ndivergence\npoints"


def _ring_label(axes: Axes, y: float, share: float, label: str, color: str, theme: Theme) -> None:
    title, _, meaning = label.partition(": ")
    axes.plot([0.16], [y], marker="s", markersize=14, color=color, clip_on=False)
    axes.text(0.34, y + 0.1, f"{100 * share:.1f} %", fontsize=17, va="center", color=theme.ink, weight="bold")
    axes.text(1.2, y + 0.09, title, fontsize=11.5, va="center", color=theme.ink)
    axes.text(0.34, y - 0.15, meaning, fontsize=11, va="center", color=theme.muted)


def hit_at_k(hit_rate: dict[str, Any], ci95: dict[str, Any] | None, theme: Theme = LIGHT) -> bytes:
    """Hit rate (in [0, 1]) against K at divergence points, with 95 % intervals where given; PNG bytes."""
    figure, [axes] = panels(theme)
    ks = sorted((int(k) for k, rate in hit_rate.items() if _is_number(rate)))
    rates = [100 * hit_rate[str(k)] for k in ks]
    axes.errorbar(
        ks,
        rates,
        yerr=error_bars(rates, [(ci95 or {}).get(str(k)) for k in ks]),
        color=theme.lines[3],
        marker="o",
        markersize=6,
        linewidth=2,
        capsize=4,
    )
    for k, rate in zip(ks, rates, strict=True):
        offset, align = ((9, -13), "left") if rate > 12 else ((9, 8), "left")
        axes.annotate(f"{rate:.1f}", (k, rate), offset, textcoords="offset points", ha=align, color=theme.ink)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set_ylim(0, 104)
    axes.set_xlabel("K (number of SLM candidates, log scale)")
    axes.set_ylabel("hit@K at divergence points (%)")
    return png(figure)


def hit_by_divergence(bins: Sequence[dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """Hit@1, 2, 4, 8 in each divergence bin, with the number of steps under it; PNG bytes."""
    figure, [axes] = panels(theme)
    for k, color, marker in zip(HIT_BY_DIVERGENCE_KS, theme.lines, "osD^", strict=True):
        rates = [_percent_or_nan(entry["hit_rate"].get(k)) for entry in bins]
        if not all(math.isnan(rate) for rate in rates):
            axes.plot(rates, color=color, marker=marker, markersize=6, linewidth=2, label=f"hit@{k}")
    is_crowded = len(bins) > 7
    slant: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if is_crowded else {}
    labels = [_bin_label(entry, ", " if is_crowded else "\n") for entry in bins]
    axes.set_xticks(range(len(bins)), labels, fontsize=8 if is_crowded else 8.5, **slant)
    axes.margins(x=0.06)
    axes.set_ylim(0, 104)
    axes.set_xlabel("divergence of the step (nats; n = steps in the bin)")
    axes.set_ylabel("hit rate (%)")
    axes.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        frameon=False,
        labelcolor=theme.ink,
        fontsize=10,
    )
    return png(figure)


def accuracy_cost(strategies: dict[str, dict[str, Any]], theme: Theme = LIGHT) -> bytes:
    """Accuracy with 95 % error bars against FLOPs of both models (forwards where unknown); PNG bytes."""
    figure, [axes] = panels(theme)
    costs, label = _costs(strategies)
    points = []
    for name, scores in strategies.items():
        color, marker = _STYLES.get(name.partition("@")[0], _OTHER_STYLE)  # s2t@entropy is an s2t
        accuracy = 100 * scores["accuracy"]
        axes.errorbar(
            [costs[name]],
            [accuracy],
            yerr=error_bars([accuracy], [scores.get("ci95")]),
            color=color or theme.ink,
            marker=marker,
            markersize=11 if marker == "*" else 8,
            capsize=3,
            linewidth=1.4,
        )
        points.append((costs[name], accuracy))
    axes.set_xscale("log")
    axes.margins(x=0.16, y=0.12)
    _log_ticks(axes, list(costs.values()))
    axes.set_xlabel(f"{label} (log scale)")
    axes.set_ylabel("accuracy (%), with 95 % interval")
    spans = [span(100 * scores["accuracy"], scores.get("ci95")) for scores in strategies.values()]
    place_labels(axes, points, list(strategies), spans, theme)
    return png(figure)


def place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    labels: Sequence[str],
    spans: Sequence[tuple[float, float]],
    theme: Theme = LIGHT,
) -> list[Annotation]:
    """Write one label per point so that no label covers another, a point, or a point's error bar.

    `spans` are the (low, high) ends of the error bars, in data units. The nearest free place inside the
    axes is taken; a label that had to move away gets a thin line to its point. Freezes the layout.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure: Any = axes.get_figure(root=True)
    canvas: Any = figure.canvas
    canvas.draw()  # settles the layout, so pixel positions are final
    figure.set_layout_engine("none")
    taken = [_obstacle(axes, x, low, high) for (x, _), (low, high) in zip(points, spans, strict=True)]
    placed = []
    for point, label in zip(points, labels, strict=True):
        note = _annotate(axes, point, label, theme)
        _move_to_free_place(note, taken, axes.get_window_extent(), canvas.get_renderer())
        box = Text.get_window_extent(note)
        taken.append(Bbox([[box.x0 - 4, box.y0 - 3], [box.x1 + 4, box.y1 + 3]]))
        placed.append(note)
    return placed


def _annotate(axes: Axes, point: tuple[float, float], label: str, theme: Theme) -> Annotation:
    arrow = {"arrowstyle": "-", "color": theme.muted, "linewidth": 0.7, "shrinkB": 5}
    note = axes.annotate(
        label, point, (0, 0), textcoords="offset points", color=theme.ink, fontsize=10, arrowprops=arrow
    )
    note.set_parse_math(False)
    return note


def _move_to_free_place(note: Annotation, taken: Sequence[Any], inside: Any, renderer: Any) -> None:
    """Put the label at the place nearest its point that is free of `taken` and within the axes."""
    from matplotlib.text import Text

    for radius in _RADII:
        for angle in _ANGLES:
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            note.xyann = (dx, dy)
            note.set(ha="left" if dx > 1 else "right" if dx < -1 else "center", va=_vertical(dy))
            if note.arrow_patch is not None:
                note.arrow_patch.set_visible(radius > 20)
            note.update_positions(renderer)
            box = Text.get_window_extent(note)
            is_inside = inside.x0 < box.x0 and box.x1 < inside.x1 and inside.y0 < box.y0 and box.y1 < inside.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                return


def _vertical(dy: float) -> str:
    return "bottom" if dy > 1 else "top" if dy < -1 else "center"


def _obstacle(axes: Axes, x: float, low: float, high: float) -> Any:
    """Pixel box of a point with its error bar."""
    from matplotlib.transforms import Bbox

    (x0, y0), (_, y1) = axes.transData.transform([(x, low), (x, high)])
    return Bbox([[x0 - 9, y0 - 7], [x0 + 9, y1 + 7]])


def _costs(strategies: dict[str, dict[str, Any]]) -> tuple[dict[str, float], str]:
    """Cost of each strategy and what it counts: FLOPs where every strategy has them, else forwards."""
    readings: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        (
            "total FLOPs, SLM + LLM",
            lambda scores: (scores.get("slm_flops") or 0) + (scores.get("llm_flops") or 0),
        ),
        ("total forwards, SLM + LLM", lambda scores: scores["slm_forwards"] + scores["llm_forwards"]),
    )
    costs: dict[str, float] = {}
    for label, read in readings:
        costs = {name: float(read(scores)) for name, scores in strategies.items()}
        if all(cost > 0 for cost in costs.values()):
            return costs, label
    return {name: max(cost, 1.0) for name, cost in costs.items()}, readings[-1][0]


def _log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Labelled ticks at 1, 2, 5 of each decade, or at decades alone where the values span many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    is_wide = max(values) / min(values) > 300
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if is_wide else (1.0, 2.0, 5.0), numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _scientific(value)))


def _scientific(value: float) -> str:
    """12000 -> 12,000; 2e12 -> 2 x 10^12 in mathtext."""
    if value < 1e6:
        return f"{value:,.0f}"
    power = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10**power)
    return f"$10^{{{power}}}$" if digit == 1 else f"${digit}\\times10^{{{power}}}$"


def _bin_label(entry: dict[str, Any], separator: str) -> str:
    low, high = entry["low"], entry["high"]
    dash = "–\n" if separator == "\n" else "–"
    label = f"{low:.2g}{dash}{high:.2g}" if _is_number(low) and _is_number(high) else f"≥ {low or 0:.2g}"
    return f"{label}{separator}n = {entry['num_steps']:,}"


def _percent_or_nan(rate: Any) -> float:
    return 100 * rate if _is_number(rate) else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
