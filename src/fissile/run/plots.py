"""The report's figures: metrics and theme in, a figure or None (not measured) out."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from fissile.run.axes import (
    NAMES,
    Axes,
    cap,
    draw_heat,
    draw_legend,
    draw_line,
    in_even_shares,
    make_axes,
    note,
    ppl_ticks,
    ratio_ticks,
    score_ratio,
)
from fissile.run.metrics import Metrics, Variant, find_width, shares
from fissile.run.plots_routing import routers
from fissile.run.theme import MARKERS, Theme

_CONTROLS = (
    "oracle",
    "oracle_layerwise",
    "oracle_per_layer",
    "pregate_dynamic",
    "pregate",
    "per_layer_dynamic",
    "per_layer",
    "token",
    "ridge",
    "dynamic",
    "spectral",
    "mean_gate",
    "readme",
    "expertweaver",
    "cmoe",
    "emoe",
    "static",
    "static_uniform",
    "random",
    "all_experts",
)
_METHODS = ("nested", "dedicated", "gptq", "rtn", "gptaq", "decoupleq")
_OURS = ("nested", "dedicated")
_RECOVERIES = ("none", "refit", "trained")


def controls(metrics: Metrics, theme: Theme) -> Figure | None:
    """Perplexity over the dense model's, per active share: every control, before and after."""
    levels = shares(metrics)
    if metrics.dense is None or not levels:
        return None
    present = {v.name for v in metrics.variants if v.share < 1}
    names = [n for n in _CONTROLS if n in present]
    figure, axes = make_axes(1, len(levels), height=0.9 + 0.36 * len(names))
    for axis, share in zip(axes, levels, strict=True):
        for row, name in enumerate(names):
            points = [
                (v, ratio)
                for v in sorted(metrics.variants, key=lambda v: _RECOVERIES.index(v.recovery))
                if v.name == name
                and math.isclose(v.share, share)
                and (ratio := score_ratio(v, metrics.dense)) is not None
            ]
            _control_row(axis, row, name, points, theme)
        axis.axvline(1, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.set_yticks(range(len(names)), [NAMES.get(n, n) for n in names])
        axis.set_ylim(len(names) - 0.5, -0.6)
        axis.grid(axis="y", visible=False)
        axis.set_title(f"active share {share:g}")
        axis.set_xlabel("perplexity / dense")
        axis.margins(x=0.16)
        ratio_ticks(axis.xaxis)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    return figure


def _control_row(
    axis: Axes, row: int, name: str, points: list[tuple[Variant, float]], theme: Theme
) -> None:
    if not points:
        return
    color = theme.method[name]
    axis.plot([r for _, r in points], [row] * len(points), color=color, alpha=0.35, zorder=2)
    for variant, ratio in points:
        face = {"none": theme.paper, "refit": color, "trained": theme.ink}[variant.recovery]
        axis.plot(
            ratio,
            row,
            MARKERS[name],
            color=color,
            markerfacecolor=face,
            markeredgewidth=1.6,
            zorder=3,
        )
    last, ratio = points[-1]
    axis.annotate(
        f"{last.ppl:.1f}",
        (ratio, row),
        (0, 6),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=theme.muted,
    )


def domains(metrics: Metrics, theme: Theme) -> Figure | None:
    """Perplexity over the dense model's, per domain, for each control at its best recovery."""
    levels = shares(metrics)
    if metrics.dense is None or not levels or len(metrics.dense.by_domain) < 2:
        return None
    names = sorted(metrics.dense.by_domain)
    figure, axes = make_axes(1, len(levels), height=1.25 + 0.38 * len(names))
    shown: dict[str, None] = {}
    for axis, share in zip(axes, levels, strict=True):
        here = [v for v in metrics.variants if math.isclose(v.share, share)]
        for control in _CONTROLS:
            found = [v for v in here if v.name == control]
            if not found:
                continue
            best = max(found, key=lambda v: _RECOVERIES.index(v.recovery))
            points = [
                (value / base, row)
                for row, domain in enumerate(names)
                if (value := best.by_domain.get(domain))
                and (base := metrics.dense.by_domain[domain])
            ]
            if points:
                shown[control] = None
                x, y = zip(*points, strict=True)
                axis.plot(x, y, MARKERS[control], color=theme.method[control], alpha=0.9)
        axis.axvline(1, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_title(f"active share {share:g}")
        axis.set_xlabel("perplexity / dense")
        axis.margins(x=0.08)
        ratio_ticks(axis.xaxis)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    draw_legend(figure, list(shown), theme, line=False)
    return figure


def widths(metrics: Metrics, theme: Theme) -> Figure | None:
    """Perplexity over the dense model's against bits, for all text and for each domain."""
    ours = [w for w in metrics.widths if w.of == "converted"]
    rows = [w for w in ours if w.method in _METHODS and w.bits and w.ppl]
    dense = metrics.dense
    if dense is None or not dense.ppl or not rows:
        return None
    bits = sorted({w.bits for w in rows if w.bits})
    panels: list[tuple[str, str | None]] = [("all text", None)]
    if len(dense.by_domain) > 1:
        panels += [(name, name) for name in sorted(dense.by_domain)[:5]]
    figure, axes = make_axes(1, len(panels), height=2.9, sharey=True)
    floats = find_width(metrics, "float", None)
    matter = [1.0]
    for axis, (title, domain) in zip(axes, panels, strict=True):
        for method in _METHODS:
            points = [
                (w.bits, ratio)
                for w in sorted(rows, key=lambda w: w.bits or 0)
                if w.method == method and (ratio := score_ratio(w, dense, domain)) is not None
            ]
            draw_line(axis, points, method, theme)
            matter += [ratio for _, ratio in points] if method in _OURS else []
        floor = score_ratio(floats, dense, domain) if floats else 1.0
        if floor is not None:
            axis.axhline(floor, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            matter.append(floor)
        axis.set_title(title)
        axis.set_xticks(bits)
        axis.set_xlim(bits[0] - 0.4, bits[-1] + 0.4)
        axis.set_xlabel("bits")
    cap(axes[0], matter)
    ratio_ticks(axes[0].yaxis)
    axes[0].set_ylabel("perplexity / dense")
    draw_legend(figure, [m for m in _METHODS if any(w.method == m for w in rows)], theme)
    return figure


def sizes(metrics: Metrics, theme: Theme) -> Figure | None:
    """Bytes a load reads against perplexity: dense, converted floats, and every width."""
    rows = [w for w in metrics.widths if w.bytes and w.ppl and w.of == "converted"]
    dense = metrics.dense
    if not rows or dense is None or not dense.ppl:
        return None
    figure, (axis,) = make_axes(1, 1, height=3.4)
    for method in reversed(_METHODS):
        ordered = sorted((w for w in rows if w.method == method), key=lambda w: w.bytes or 0)
        draw_line(axis, [((w.bytes or 0) / 1e6, w.ppl) for w in ordered], method, theme)
        if method == "nested":
            for w in ordered:
                note(
                    axis,
                    (w.bytes or 0) / 1e6,
                    w.ppl or 0,
                    f"{w.bits}-bit",
                    theme,
                    (-7, -11),
                    "right",
                )
    whole = [("converted, floats", w.bytes, w.ppl) for w in rows if w.method == "float"]
    whole += [("dense", metrics.dense_bytes, dense.ppl)] if metrics.dense_bytes else []
    for place, (name, size, ppl) in enumerate(sorted(whole, key=lambda point: point[2] or 0)):
        x, y = (size or 0) / 1e6, ppl or 0
        color = theme.ink if name == "dense" else theme.method["pregate"]
        face = theme.ink if name == "dense" else theme.paper
        marker = "*" if name == "dense" else "o"
        axis.plot(x, y, marker, color=color, markerfacecolor=face, markersize=8)
        # The lower point's label goes below, the higher one's above: the two are close.
        note(axis, x, y, name, theme, (4, -15) if place == 0 else (4, 9), "right")
    axis.set_xlabel("MB read at load")
    axis.set_ylabel("perplexity")
    axis.set_xlim(left=0)
    axis.margins(y=0.15)
    cap(axis, [dense.ppl, *(w.ppl for w in rows if w.method in (*_OURS, "float") and w.ppl)], 0.8)
    ppl_ticks(axis)
    draw_legend(figure, [m for m in _METHODS if any(w.method == m for w in rows)], theme)
    return figure


def layer_loss(metrics: Metrics, theme: Theme) -> Figure | None:
    """Relative quantization loss per layer and width: the mean over tensors, and each tensor."""
    bits = sorted({b for row in metrics.layers for b in row.loss}, key=int)
    layers = sorted({row.layer for row in metrics.layers})
    if not bits:
        return None
    figure, (axis,) = make_axes(1, 1, height=3.0)
    for place, width in enumerate(bits):
        # Shades of one hue: the widths are one method at three settings.
        alpha = 1.0 - 0.3 * place
        points = [(r.layer, v) for r in metrics.layers if (v := r.loss.get(width))]
        if not points:
            continue
        axis.plot(
            *zip(*points, strict=True),
            ".",
            color=theme.method["nested"],
            alpha=0.25,
            markersize=4,
            zorder=2,
        )
        means = [
            (layer, sum(here) / len(here))
            for layer in layers
            if (here := [v for at, v in points if at == layer])
        ]
        axis.plot(
            *zip(*means, strict=True),
            color=theme.method["nested"],
            alpha=alpha,
            linewidth=2,
            zorder=3,
        )
        note(axis, *means[-1], f"{width}-bit", theme, (7, 0), va="center")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(layers[0] - 0.3, layers[-1] + 0.07 * len(layers) + 0.2)
    axis.set_xlabel("layer")
    axis.set_ylabel("relative loss")
    return figure


def experts(metrics: Metrics, theme: Theme) -> Figure | None:
    """Expert load per layer, and which domain chooses which expert; 1 is an even share."""
    routing = metrics.routing
    maps: list[tuple[str, list[str], list[list[float | None]], str]] = []
    if routing is not None and routing.expert_load:
        load = [in_even_shares(row) for row in routing.expert_load]
        alike = len(load) == 1 or all(row == load[0] for row in load)
        names = ["every layer"] if alike else [str(i) for i in range(len(load))]
        maps.append(("load", names, load[:1] if alike else load, "" if alike else "layer"))
    if routing is not None and routing.domain_expert is not None:
        rows = [in_even_shares(row) for row in routing.domain_expert.matrix]
        maps.append(("domain by expert", routing.domain_expert.domains, rows, ""))
    if not maps:
        return None
    tallest = max(len(m[1]) for m in maps)
    figure, axes = make_axes(1, len(maps), height=min(0.8 + 0.34 * tallest, 7.0))
    ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
    peak = max([2.0, *(v for m in maps for row in m[2] for v in row if v is not None)])
    for axis, (title, names, rows, label) in zip(axes, maps, strict=True):
        draw_heat(axis, names, rows, ramp, peak, theme)
        if len(names) < 16:  # else the map fills its axes
            axis.set_box_aspect(0.088 * len(names))
            axis.set_anchor("NW")
        axis.set_title(title)
        axis.set_ylabel(label)
        axis.set_xlabel("expert")
    return figure


def agreement(metrics: Metrics, theme: Theme) -> Figure | None:
    """Share of the oracle's choices that the router makes too, per layer, against chance."""
    routing = metrics.routing
    if routing is None or not routing.recall_at_k:
        return None
    figure, (axis,) = make_axes(1, 1, height=2.6)
    recall = routing.recall_at_k
    layers = range(len(recall))
    color = theme.method["pregate"]
    axis.plot(layers, recall, "o-", color=color)
    note(axis, len(recall) - 1, recall[-1], "pre-gating", theme, (9, 0), va="center")
    if routing.top_k and routing.num_experts:
        chance = routing.top_k / routing.num_experts
        ends = [-0.3, len(recall) - 1]
        axis.plot(ends, [chance] * 2, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        note(axis, len(recall) - 1, chance, "chance", theme, (9, 0), va="center")
    axis.set_ylim(0, 1)
    axis.set_xlim(-0.3, len(recall) - 1 + max(0.12 * len(recall), 0.5))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f} %"))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer")
    axis.set_ylabel("recall of the oracle's choices")
    return figure


def curves(metrics: Metrics, theme: Theme) -> Figure | None:
    """Training losses of the router and of the recovery, raw and smoothed."""
    found = [
        (title, losses)
        for title, losses in (
            ("router distillation", metrics.router_curve),
            ("recovery", metrics.recovery_curve),
        )
        if losses
    ]
    if not found:
        return None
    figure, axes = make_axes(1, len(found), height=2.4)
    for axis, (title, losses) in zip(axes, found, strict=True):
        span = max(1, len(losses) // 20)
        near = [losses[max(0, i - span) : i + span + 1] for i in range(len(losses))]
        smooth = [sum(part) / len(part) for part in near]
        steps = range(1, len(losses) + 1)
        color = theme.method["pregate"]
        axis.plot(steps, losses, color=color, alpha=0.3, linewidth=1)
        axis.plot(steps, smooth, color=color)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes[0].set_ylabel("loss")
    return figure


FIGURES: dict[str, Callable[[Metrics, Theme], Figure | None]] = {
    "controls": controls,
    "domains": domains,
    "widths": widths,
    "sizes": sizes,
    "layer_loss": layer_loss,
    "experts": experts,
    "agreement": agreement,
    "routers": routers,
    "curves": curves,
}
