"""Parts that the report's figures share: axes, ticks for perplexities, labels, heat maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from fissile.run.metrics import Score
from fissile.run.theme import MARKERS, Theme

Axes = Any
WIDTH = 9.2
"""Inches; the page's column."""

NAMES = {
    "all_experts": "all experts",
    "cmoe": "CMoE",
    "emoe": "EMoE",
    "expertweaver": "ExpertWeaver",
    "gptq": "GPTQ",
    "mean_gate": "mean gate",
    "oracle_layerwise": "oracle, layer-wise",
    "oracle_per_layer": "oracle, per layer",
    "dynamic": "ridge, varying k",
    "static_uniform": "static, layers alike",
    "per_layer": "pre-gating, per layer",
    "per_layer_dynamic": "per layer, varying k",
    "pregate_dynamic": "pre-gating, varying k",
    "pregate": "pre-gating",
    "readme": "Read-ME",
    "rtn": "RTN",
    "gptaq": "GPTAQ",
    "decoupleq": "decoupleQ",
    "token": "pre-gating, token id",
}


def make_axes(
    rows: int, columns: int, *, height: float, sharey: bool = False
) -> tuple[Figure, Axes]:
    """A figure of the page's width with rows x columns axes, as a flat list."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def score_ratio(score: Score, dense: Score, domain: str | None = None) -> float | None:
    """Perplexity over the dense model's, of all text or of one domain; None if not measured."""
    if domain is None:
        ours, base = score.ppl, dense.ppl
    else:
        ours, base = score.by_domain.get(domain), dense.by_domain.get(domain)
    return ours / base if ours and base else None


def draw_line(
    axis: Axes, points: Sequence[tuple[Any, float | None]], method: str, theme: Theme
) -> None:
    """A method's points joined by a line, in its colour and marker."""
    if points:
        x, y = zip(*points, strict=True)
        axis.plot(x, y, MARKERS[method] + "-", color=theme.method[method], markersize=5)


def note(
    axis: Axes,
    x: float,
    y: float,
    text: str,
    theme: Theme,
    offset: tuple[float, float],
    ha: str = "left",
    va: str = "baseline",
) -> None:
    """Text beside a point."""
    axis.annotate(
        text,
        (x, y),
        offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=8.5,
        color=theme.ink,
    )


def draw_legend(figure: Figure, methods: Sequence[str], theme: Theme, *, line: bool = True) -> None:
    """One legend above all axes of a figure."""
    handles = [
        Line2D(
            [],
            [],
            color=theme.method[m],
            marker=MARKERS[m],
            linestyle="-" if line else "",
            label=NAMES.get(m, m),
        )
        for m in methods
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 7), fontsize=9)


def ratio_ticks(axis: Any) -> None:
    """Log axis with plain numbers at round values."""
    parent = axis.axes
    (parent.set_xscale if axis is parent.xaxis else parent.set_yscale)("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def ppl_ticks(axis: Axes) -> None:
    """Plain numbers; log scale only where the axis spans more than a factor of three."""
    low, high = axis.get_ylim()
    if low > 0 and high > 3 * low:
        ratio_ticks(axis.yaxis)


def cap(axis: Axes, values: Sequence[float], below: float = 0.93) -> None:
    """End the y axis above the values that matter; lines of far worse models leave the picture."""
    if values:
        low, top = axis.get_ylim()
        axis.set_ylim(max(low, below * min(values)), min(top, 1.6 * max(values)))


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two positive bounds, for a log axis."""
    low = max(low, 1e-9)
    wide = [m * 10.0**e for e in range(-9, 13) for m in (1, 2, 5)]
    found = [v for v in wide if low <= v <= high]
    if len(found) > 6:
        found = [v for v in found if math.log10(v).is_integer()] or found
    if len(found) >= 3:
        return found
    steps = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)]
    step = next((s for s in steps if (high - low) / s <= 7), steps[-1])
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def in_even_shares(row: Sequence[float | None]) -> list[float | None]:
    """A row in units of an even share."""
    total = sum(v for v in row if v is not None)
    return [v * len(row) / total if v is not None and total > 0 else None for v in row]


def draw_heat(
    axis: Axes,
    names: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    ramp: Any,
    peak: float,
    theme: Theme,
) -> None:
    """A heat map with the values written in where there is room."""
    columns = max(map(len, rows))
    values = [[math.nan if v is None else v for v in row] for row in rows]
    gap = 1 if columns <= 16 else 0
    axis.pcolormesh(values, cmap=ramp, vmin=0, vmax=peak, edgecolors=theme.paper, linewidth=gap)
    axis.invert_yaxis()
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_yticks([i + 0.5 for i in range(len(names))], names)
    if len(names) > 16:
        keep = range(0, len(names), -(-len(names) // 16))
        axis.set_yticks([i + 0.5 for i in keep], [names[i] for i in keep])
    step = max(1, -(-columns // 16))
    axis.set_xticks([i + 0.5 for i in range(0, columns, step)], list(range(0, columns, step)))
    if columns <= 10 and len(rows) <= 40:
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value is not None:
                    strong = value > 0.65 * peak
                    color = theme.paper if strong else theme.ink
                    axis.text(
                        j + 0.5,
                        i + 0.5,
                        f"{value:.1f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=color,
                    )
