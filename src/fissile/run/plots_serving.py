"""Figures about serving: systems by capacity, and how long requests wait for their tokens."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from fissile.run.axes import make_axes, ratio_ticks
from fissile.run.metrics_serving import Percentiles, Serving, ServingRow
from fissile.run.theme import MARKERS, Theme

_LIKE = {
    "fissile": "pregate",
    "oracle": "oracle",
    "on-demand": "random",
    "prefetch": "ridge",
    "layered": "mean_gate",
    "mixed": "all_experts",
    "hybrimoe": "cmoe",
    "expertflow": "readme",
}
"""Colour and marker of a system are those of a method that no other system of the page has."""
_OTHERS = ("static", "emoe", "oracle_per_layer", "per_layer")


def look(found: Serving) -> dict[str, str]:
    """Every system's method in the theme."""
    free = list(_OTHERS)
    table = {}
    for name in found.names:
        table[name] = _LIKE.get(name) or (free.pop(0) if free else "random")
    return table


def by_capacity(found: Serving, theme: Theme) -> Figure | None:
    """Tokens per second, hit rate and bytes moved over the share of experts that fits."""
    if len(found.shares) < 2:
        return None
    figure, axes = make_axes(1, 3, height=3.4)
    panels: tuple[tuple[str, Callable[[ServingRow], float]], ...] = (
        ("tokens per second", lambda row: row.outcome.tokens_per_second),
        ("in memory when needed", lambda row: row.outcome.hit_rate),
        ("kB moved per token", lambda row: row.outcome.bytes_per_token / 1e3),
    )
    methods = look(found)
    for axis, (title, value) in zip(axes, panels, strict=True):
        for name in found.names:
            rows = sorted((r for r in found.rows if r.name == name), key=lambda r: r.share)
            axis.plot(
                [row.share for row in rows],
                [value(row) for row in rows],
                MARKERS[methods[name]] + "-",
                color=theme.method[methods[name]],
                markersize=5,
            )
        axis.set_title(title)
        axis.set_xticks(found.shares)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
        axis.set_xlabel("experts that fit")
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    axes[1].set_ylim(0, 1.03)
    axes[1].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    _legend(figure, methods, theme)
    return figure


def delays(found: Serving, theme: Theme) -> Figure | None:
    """Median to 99th percentile of each system's delays, at the middle capacity."""
    rows = found.at(middle(found))
    figure, axes = make_axes(1, 3, height=1.3 + 0.3 * len(rows))
    panels: tuple[tuple[str, Callable[[ServingRow], Percentiles]], ...] = (
        ("first token, s", lambda row: row.outcome.ttft),
        ("between tokens, s", lambda row: row.outcome.tbt),
        ("longest wait of a request, s", lambda row: row.outcome.wait),
    )
    methods = look(found)
    for axis, (title, value) in zip(axes, panels, strict=True):
        least = min((value(row).p50 for row in rows if value(row).p50 > 0), default=0.0)
        for y, row in enumerate(rows):
            spread, color = value(row), theme.method[methods[row.name]]
            ends = [max(spread.p50, 0.5 * least), max(spread.p99, 0.5 * least)]
            axis.plot(ends, [y, y], "-", color=color, linewidth=2)
            axis.plot(ends[0], y, MARKERS[methods[row.name]], color=color)
            axis.plot(ends[1], y, "|", color=color, markersize=9, markeredgewidth=2)
        axis.set_title(title)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        if least > 0:
            ratio_ticks(axis.xaxis)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    for axis in axes[1:]:
        axis.set_yticks(range(len(rows)), [""] * len(rows))
    return figure


def passes(found: Serving, theme: Theme) -> Figure | None:
    """Different experts that a pass needs, and how the time of the link is spent."""
    rows = found.at(middle(found))
    figure, axes = make_axes(1, 2, height=1.3 + 0.28 * len(rows))
    methods = look(found)
    panels: tuple[tuple[str, Callable[[ServingRow], float]], ...] = (
        (
            f"experts of {found.trace.model.experts} that a pass needs in a layer",
            lambda row: row.outcome.unique_experts,
        ),
        ("time spent waiting for experts, %", lambda row: 100 * row.outcome.stall_share),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        values = [value(row) for row in rows]
        colors = [theme.method[methods[row.name]] for row in rows]
        axis.barh(range(len(rows)), values, color=colors, height=0.62)
        for y, number in enumerate(values):
            axis.annotate(
                f"{number:.1f}", (number, y), (4, 0), textcoords="offset points", va="center"
            )
        axis.set_title(title)
        axis.set_xlim(0, 1.15 * max([*values, 1e-9]))
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    axes[1].set_yticks(range(len(rows)), [""] * len(rows))
    return figure


def middle(found: Serving) -> float:
    """The capacity that single figures are about: the one nearest to a half."""
    return min(found.shares, key=lambda share: abs(share - 0.5))


def _legend(figure: Figure, methods: dict[str, str], theme: Theme) -> None:
    handles = [
        Line2D([], [], color=theme.method[m], marker=MARKERS[m], linestyle="-", label=name)
        for name, m in methods.items()
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 8), fontsize=9)


SERVING: dict[str, Callable[[Serving, Theme], Figure | None]] = {
    "capacity": by_capacity,
    "delays": delays,
    "passes": passes,
}
SERVING_CAPTIONS = {
    "capacity": "Systems by the share of the experts that fits in fast memory. Left: generated"
    " tokens per second. Middle: how often an expert was there when a layer needed it. Right: what"
    " came over the link.",
    "delays": "Marker to bar: median to 99th percentile, by request, for tokens by token. Further"
    " left is better; the axes are logarithmic.",
    "passes": "What a pass needs, and what it waits for. Left: different experts of a layer, mean"
    " over layers and passes; fewer are read. Right: share of the time in which the device waits"
    " for experts that are on their way.",
}
