"""Figures about routers: how their choices repeat, and how near they come to the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fissile.run.axes import NAMES, draw_heat, make_axes, note
from fissile.run.gap import Gap, variant_gap
from fissile.run.metrics import Metrics, Recovery
from fissile.run.metrics_routing import Information, Redundancy
from fissile.run.theme import MARKERS, Theme

DISTANCES = (1, 2, 4, 8, 16, 32, 64)
"""Distances of `LayerChoices.same`."""
_RECOVERIES: tuple[Recovery, ...] = ("trained", "refit", "none")


def transitions(found: Redundancy, theme: Theme) -> Figure | None:
    """Heat maps of P(set of the later layer | set of the earlier layer), the common sets."""
    if not found.transitions:
        return None
    tallest = max(len(t.rows) for t in found.transitions)
    figure, axes = make_axes(1, len(found.transitions), height=1.3 + 0.3 * tallest)
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    for axis, table in zip(axes, found.transitions, strict=True):
        names = [
            f"{_name(r)}  {100 * s:.0f} %" for r, s in zip(table.rows, table.share, strict=True)
        ]
        draw_heat(axis, names, [list(row) for row in table.probability], ramp, 1.0, theme)
        columns = [_name(c) for c in table.columns]
        axis.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=60, fontsize=8)
        axis.set_title(f"layer {table.earlier} to {table.later}")
        axis.set_xlabel(f"experts in layer {table.later}")
        axis.set_ylabel(f"experts in layer {table.earlier}, share of tokens")
    return figure


def _name(experts: list[int]) -> str:
    return ",".join(map(str, experts)) or "none"


def information(found: Redundancy, theme: Theme) -> Figure | None:
    """Mutual information of neighbouring layers against shuffled tokens and against the entropy."""
    if not found.pairs:
        return None
    figure, axes = make_axes(1, 2, height=2.9, sharey=False)
    panels: dict[str, Sequence[Information]] = {
        "sets of experts": found.pairs,
        "first expert of each token": [pair.first for pair in found.pairs],
    }
    x = [pair.later for pair in found.pairs]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        color = theme.method["pregate"]
        ceiling = [min(r.entropy_a, r.entropy_b) for r in rows]
        axis.plot(x, ceiling, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        axis.plot(x, [r.information for r in rows], "o-", color=color)
        axis.plot(x, [r.shuffled for r in rows], "v-", color=theme.method["random"], markersize=5)
        top = max(ceiling) or 1.0
        axis.set_ylim(0, 1.12 * top)
        # Labels at the first point, pushed apart where the lines meet.
        ends = sorted(
            (
                (ceiling[0], "all there is"),
                (rows[0].information, "measured"),
                (rows[0].shuffled, "shuffled"),
            ),
        )
        place = -math.inf
        for value, text in ends:
            place = max(value + 0.02 * top, place + 0.075 * top)
            note(axis, x[0], place, text, theme, (5, 0))
        axis.set_title(title)
        axis.set_xlabel("layer, with the one before")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("bits")
    return figure


def locality(found: Redundancy, theme: Theme) -> Figure | None:
    """How long choices last: switch rate per layer, and the same set again by distance."""
    rows = [row for row in found.layers if row.switch_rate is not None]
    if not rows:
        return None
    figure, axes = make_axes(1, 2, height=2.7)
    color = theme.method["pregate"]
    x = [row.layer for row in rows]
    axes[0].plot(x, [row.switch_rate for row in rows], "o-", color=color)
    note(axes[0], x[-1], rows[-1].switch_rate or 0, "another set", theme, (0, 6), "right")
    axes[0].plot(x, [row.kept for row in rows], "^-", color=theme.method["oracle"])
    note(axes[0], x[-1], rows[-1].kept or 0, "experts kept", theme, (0, 6), "right")
    axes[0].set_title("from one token to the next")
    axes[0].set_xlabel("layer")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    places, means = [], []
    for i, distance in enumerate(DISTANCES):
        values = [row.same[i] for row in rows if i < len(row.same) and row.same[i] is not None]
        if values:
            places.append(distance)
            means.append(sum(v for v in values if v is not None) / len(values))
    axes[1].plot(places, means, "o-", color=color)
    chance = sum(row.chance for row in rows) / len(rows)
    axes[1].axhline(chance, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    note(axes[1], places[-1], chance, "any two tokens", theme, (0, 4), "right")
    axes[1].set_xscale("log", base=2)
    axes[1].set_xticks(places, [str(p) for p in places])
    axes[1].set_title("same set again, mean over layers")
    axes[1].set_xlabel("tokens apart")
    for axis in axes:
        axis.set_ylim(0, 1.12)
        axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    return figure


def routers(metrics: Metrics, theme: Theme) -> Figure | None:
    """Recall of the oracle's choices and closed share of its gap, of every router measured."""
    gaps = best_gaps(metrics)
    quality = [row for row in metrics.routers if row.recall_at_k]
    if not quality and not gaps:
        return None
    order = dict.fromkeys([*gaps, *((row.name, row.share) for row in quality)])
    names = sorted(order, key=lambda key: (-key[1], str(key[0])))
    figure, axes = make_axes(1, 2, height=1.0 + 0.3 * len(names))
    several = len({share for _, share in names}) > 1
    for y, (name, share) in enumerate(names):
        color, marker = theme.method[name], MARKERS[name]
        row = next((r for r in quality if (r.name, r.share) == (name, share)), None)
        if row is not None:
            axes[0].plot(row.recall_at_k, [y] * len(row.recall_at_k), "|", color=color, alpha=0.5)
            axes[0].plot(sum(row.recall_at_k) / len(row.recall_at_k), y, marker, color=color)
        if (gap := gaps.get((name, share))) is not None:
            error = 200 * gap.error if gap.error is not None else 0.0
            axes[1].errorbar(100 * gap.closed, y, xerr=error, fmt=marker, color=color)
    labels = [f"{NAMES.get(n, n)}{f', {s:g}' if several else ''}" for n, s in names]
    axes[0].set_yticks(range(len(names)), labels)
    axes[1].set_yticks(range(len(names)), [""] * len(names))
    for axis, title in zip(
        axes, ("recall of the oracle's choices", "closed of the oracle's gap, %"), strict=True
    ):
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel(title)
    axes[0].set_xlim(0, 1)
    for at in (0, 100):
        axes[1].axvline(at, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return figure


def best_gaps(metrics: Metrics) -> dict[tuple[str, float], Gap]:
    """Closed share of the gap from the static model, by router and share, furthest recovery."""
    found: dict[tuple[str, float], Gap] = {}
    for recovery in _RECOVERIES:
        for variant in metrics.variants:
            key = (variant.name, variant.share)
            if variant.recovery == recovery and key not in found:
                gap = variant_gap(metrics, variant, "static")
                if gap is not None:
                    found[key] = gap
    return found


REDUNDANCY: dict[str, Callable[[Redundancy, Theme], Figure | None]] = {
    "transitions": transitions,
    "information": information,
    "locality": locality,
}
REDUNDANCY_CAPTIONS = {
    "transitions": "Given the set of experts that a token chose in one layer (row), how often it"
    " chose each set in the next (column), for the most common sets: the last two layers, and the"
    " two that share most. Sparse rows: the next layer's choice is nearly known.",
    "information": "Mutual information of each layer's choices with those of the layer before, in"
    " bits. Dashed: the smaller entropy, all there is to know. Shuffled: the same estimate between"
    " unrelated tokens, the bias of a finite sample; only what lies above it is real.",
    "locality": "How often a token's set of experts differs from the last token's, which share of"
    " the last token's experts it keeps, and how often the set is that of an earlier token.",
}
