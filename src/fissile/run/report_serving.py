"""The comparison page of serving systems, alone or as a section of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fissile import __version__
from fissile.errors import CorruptCheckpoint
from fissile.io.publish import atomic_write_bytes, atomic_write_json
from fissile.run.figures import draw
from fissile.run.metrics_serving import Serving, ServingRow, read_serving
from fissile.run.page import Column, Html, Text, advice_list, page, paragraph, section, table

FOLDER = "serving"
"""Where a run folder keeps comparisons."""
_FILE = "serving.json"


def write_comparison(found: dict[str, Any], out: Path) -> list[Path]:
    """Write serving.json and a self-contained serving.html.

    Args:
        found: a comparison as JSON, from `serve.systems`.
        out: folder; made if absent, files of these names are replaced.
    """
    serving = Serving.model_validate(found)
    out.mkdir(parents=True, exist_ok=True)
    sections = [
        section("What to use", [advice_list(serving_advice(serving))]),
        section("Systems side by side", serving_parts(serving)),
    ]
    model = serving.trace.model
    text = page(
        f"Serving {model.name}",
        f"{serving.trace.requests} requests on {serving.hardware.name}, simulated",
        sections,
        f"Written by fissile {__version__}.",
    )
    atomic_write_json(out / _FILE, found)
    atomic_write_bytes(out / "serving.html", text.encode())
    return [out / _FILE, out / "serving.html"]


def stored_comparisons(folder: Path) -> list[tuple[str, Serving | str]]:
    """Comparisons in a run folder: file name, and contents or why they cannot be read.

    Args:
        folder: the run folder; they lie in serving/ or one folder further down.
    """
    root = folder / FOLDER
    found: list[tuple[str, Serving | str]] = []
    for path in sorted([*root.glob(_FILE), *root.glob(f"*/{_FILE}")]):
        name = str(path.relative_to(folder))
        try:
            found.append((name, read_serving(path)))
        except CorruptCheckpoint as err:
            found.append((name, str(err)))
    return found


def stored_parts(stored: Sequence[tuple[str, Serving | str]]) -> list[Html | None]:
    """Contents of the report's section on serving."""
    parts: list[Html | None] = []
    for name, serving in stored:
        if isinstance(serving, str):
            parts.append(paragraph(f"{name} was not read: {serving}"))
        else:
            parts += [advice_list(serving_advice(serving)), *serving_parts(serving)]
    return parts


def serving_parts(serving: Serving) -> list[Html | None]:
    """Conditions, figures and table of one comparison."""
    from fissile.run.plots_serving import SERVING, SERVING_CAPTIONS, middle

    share = middle(serving)
    captions = dict(SERVING_CAPTIONS)
    for name in ("delays", "passes"):
        captions[name] += f" {100 * share:g} % of the experts fit."
    figures = [draw(partial(plot, serving), captions[name]) for name, plot in SERVING.items()]
    tables = [serving_table(serving), policy_table(serving)]
    return [paragraph(_conditions(serving)), *figures, *tables]


def serving_advice(serving: Serving) -> list[tuple[str, str, str]]:
    """What the numbers say, as (level, topic, text); the oracle is a bound and not advised."""
    from fissile.run.plots_serving import middle

    rows = {row.name: row for row in serving.at(middle(serving))}
    real = {name: row for name, row in rows.items() if row.cache != "oracle"}
    if not real:
        return []
    exact = {name: row for name, row in real.items() if row.executor != "mixed"}
    fastest = max(real.values(), key=lambda row: row.outcome.tokens_per_second)
    fit = f"{100 * fastest.share:g} % of the experts"
    found = [
        (
            "good",
            "Fastest",
            f"With {fit} in memory, {fastest.name} gives the most tokens per second"
            f" ({_number(fastest.outcome.tokens_per_second)}).",
        )
    ]
    if fastest.name not in exact and exact:
        second = max(exact.values(), key=lambda row: row.outcome.tokens_per_second)
        found.append(
            (
                "note",
                "Exact",
                f"{fastest.name} computes {100 * fastest.outcome.degraded_share:.2g} % of the"
                f" choices at fewer bits. Of those that compute exactly, {second.name} is fastest"
                f" ({_number(second.outcome.tokens_per_second)}).",
            )
        )
    base = real.get("on-demand")
    if base is not None and base is not fastest:
        better = fastest.outcome.tokens_per_second / base.outcome.tokens_per_second
        less = 1 - fastest.outcome.bytes_moved / base.outcome.bytes_moved
        text = f"Loading on demand with LRU is {better:.2f} times slower."
        if base.outcome.bytes_moved and less > 0:
            text += f" {fastest.name} moves {100 * less:.0f} % fewer bytes."
        found.append(("note", "On demand", text))
        slower = fastest.outcome.tbt.p99 / base.outcome.tbt.p99 if base.outcome.tbt.p99 else 0.0
        if slower > 1.5:
            text = (
                f"The price: the 99th percentile of the time between tokens is"
                f" {1000 * fastest.outcome.tbt.p99:.3g} ms, {slower:.1f} times that of loading on"
                " demand first come, first served. Fewer requests under way or a shorter longest"
                " wait lower it."
            )
            found.append(("warning", "Between tokens", text))
    needs = [row.name for row in real.values() if row.predictor.startswith("pregate")]
    decided = serving.trace.source.get("decides")
    if needs and decided == "layerwise":
        found.append(
            (
                "warning",
                "Router",
                f"This model decides inside its layers. {', '.join(needs)} would need a router that"
                " decides before the first layer, with the same choices.",
            )
        )
    return found


def policy_table(serving: Serving) -> Html:
    """What each system is made of."""
    columns = [Column(name, "") for name in ("system", "scheduler", "predictor", "cache")]
    first = {row.name: row for row in reversed(serving.rows)}
    rows: list[list[Text]] = []
    for name in serving.names:
        row = first[name]
        cache = row.cache + (", by layer" if row.per_layer else "")
        rows.append([name, row.scheduler, row.predictor, cache, row.executor])
    return table("What the systems are made of.", [*columns, Column("executor", "")], rows)


def serving_table(serving: Serving) -> Html:
    """Every system at every capacity."""
    columns = [Column("fits"), Column("system", ""), Column("tokens/s"), Column("hits %")]
    columns += [Column("experts"), Column("kB/token"), Column("wasted %"), Column("stall %")]
    columns += [Column("TTFT p50"), Column("p99"), Column("TBT p50"), Column("p95")]
    columns += [Column("p99"), Column("longest wait")]
    ordered = sorted(serving.rows, key=lambda row: row.share)
    return table(
        "Simulated, not measured. Hits: references to experts in memory when they were needed."
        " Experts: different ones of a layer that a pass needs. Wasted: bytes prefetched and"
        " dropped without use. Stall: time waiting for experts. TTFT: arrival to first token;"
        " TBT: between tokens; longest wait: of any request for a pass; all in ms.",
        columns,
        [_cells(row) for row in ordered],
    )


def _cells(row: ServingRow) -> list[Text]:
    out = row.outcome
    times = (out.ttft.p50, out.ttft.p99, out.tbt.p50, out.tbt.p95, out.tbt.p99, out.wait.max)
    return [
        f"{100 * row.share:g} %",
        row.name,
        _number(out.tokens_per_second),
        f"{100 * out.hit_rate:.1f}",
        f"{out.unique_experts:.2f}",
        _number(out.bytes_per_token / 1e3),
        f"{100 * out.wasted_share:.1f}",
        f"{100 * out.stall_share:.1f}",
        *(_number(1000 * seconds) for seconds in times),
    ]


def _number(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _conditions(serving: Serving) -> str:
    trace, machine = serving.trace, serving.hardware
    model = trace.model
    once = "one decision for all layers" if trace.decisions == 1 else "a decision in every layer"
    return (
        f"{trace.requests} requests with {trace.prompt_tokens} prompt and {trace.output_tokens}"
        f" generated tokens in {len(trace.domains)} domains; {model.layers} layers of"
        f" {model.experts} experts, at most {model.top_k} a token, {once},"
        f" {model.total_bytes / 1e6:.4g} MB of experts. Machine {machine.name}:"
        f" {machine.memory_bandwidth / 1e9:.4g} GB/s of fast memory,"
        f" {machine.link_bandwidth / 1e9:.4g} GB/s over the link."
        f" A pass takes at most {serving.limits.tokens} tokens of"
        f" {serving.limits.requests} requests."
    )
