"""Tables about routers and about speed: metrics in, table or None (not measured) out."""

from __future__ import annotations

from collections.abc import Sequence

from fissile.run.advice import LABELS, compare
from fissile.run.choice import division_of, options
from fissile.run.gap import variant_gap
from fissile.run.metrics import Metrics, Variant
from fissile.run.metrics_routing import Redundancy, RouterQuality
from fissile.run.page import Column, Html, Text, paragraph, table
from fissile.run.speed import (
    BATCHES,
    CONTEXT,
    FORMULAE,
    ffn_share_of_arithmetic,
    ffn_share_of_bytes,
)

NONE = "\u2013"
_RECOVERIES = ("trained", "refit", "none")


def quality_table(metrics: Metrics) -> Html | None:
    """Every router against the oracle: agreement, load, and the share of the gap it closes."""
    keys = dict.fromkeys((row.name, row.share) for row in metrics.routers)
    for v in metrics.variants:
        if variant_gap(metrics, v, "static") or variant_gap(metrics, v, "cmoe"):
            keys[v.name, v.share] = None
    rows: list[list[Text]] = []
    for name, share in sorted(keys, key=lambda key: (-key[1], str(key[0]))):
        row = next(
            (r for r in metrics.routers if (r.name, r.share) == (name, share)),
            RouterQuality(name=name, share=share),
        )
        last = _last(metrics, name, share)
        gaps = [
            str(gap) if last and (gap := variant_gap(metrics, last, base)) else NONE
            for base in ("static", "cmoe")
        ]
        cells = [
            *(_mean(values, 100) for values in (row.recall_at_k, row.exact, row.mass)),
            *(_mean(values, 100) for values in (row.switch_rate, row.entropy)),
            _mean(row.imbalance, 1, 2),
        ]
        label = f"{LABELS[name]} ({LABELS[last.recovery]})" if last else LABELS[name]
        rows.append([f"{share:g}", label, *cells, *gaps])
    if not rows:
        return None
    columns = [Column("share"), Column("router", "")]
    columns += [Column("recall %"), Column("same set %"), Column("norm %"), Column("switches %")]
    columns += [Column("entropy %"), Column("load max/mean")]
    columns += [Column("gap closed"), Column("… from CMoE's")]
    return table(
        "Every router against the oracle on the same experts, means over layers, on calibration"
        " text: its choices recalled, exact sets, output norm of the choices, neighbouring tokens"
        " that differ, entropy and largest load. Gap closed: (ln ppl(static) - ln ppl(router)) /"
        " (ln ppl(static) - ln ppl(oracle)) on held-out text, same share and recovery; the last"
        " column starts at CMoE's analytic router. No number where the oracle is not better by two"
        " standard errors, or where a system has experts of its own.",
        columns,
        rows,
    )


def domain_tables(metrics: Metrics) -> list[Html]:
    """Read-ME's experts one at a time: perplexity of every domain in every domain's expert."""
    found = []
    for matrix in metrics.domain_matrices:
        own = sum(matrix.own_is_best())
        rows: list[list[Text]] = [
            [name, *(NONE if value is None else f"{value:.2f}" for value in row)]
            for name, row in zip(matrix.domains, matrix.ppl, strict=True)
        ]
        part = table(
            f"Read-ME's experts at active share {matrix.share:g}, every token in one of them:"
            " perplexity on held-out text of each domain (columns) in the expert made from each"
            f" (rows). {own} of {len(matrix.domains)} domains are best served by their own.",
            [Column("expert", ""), *(Column(name) for name in matrix.domains)],
            rows,
        )
        found.append(part)
    return found


def _last(metrics: Metrics, name: str, share: float) -> Variant | None:
    """The measurement of a router at its furthest recovery for which a gap is known."""
    own = [v for v in metrics.variants if (v.name, v.share) == (name, share)]
    own.sort(key=lambda v: _RECOVERIES.index(v.recovery))
    known = (v for v in own if variant_gap(metrics, v, "static") or variant_gap(metrics, v, "cmoe"))
    return next(known, None)


def redundancy_table(found: Redundancy) -> Html:
    """Entropy, locality and information per layer."""
    pairs = {pair.later: pair for pair in found.pairs}
    rows: list[list[Text]] = []
    for layer in found.layers:
        pair = pairs.get(layer.layer)
        told: list[Text] = [NONE] * 4
        if pair is not None:
            told = [
                f"{pair.conditional:.2f}",
                f"{pair.information:.2f} ({pair.shuffled:.2f})",
                f"{100 * pair.adjusted:.0f} %",
                f"{100 * pair.predictable:.0f} %",
            ]
        rows.append(
            [
                str(layer.layer),
                str(layer.sets),
                f"{layer.entropy:.2f}",
                *told,
                _share(layer.switch_rate),
                _share(layer.kept),
                NONE if layer.repeat_distance is None else f"{layer.repeat_distance:.1f}",
                f"{layer.imbalance:.2f}",
            ]
        )
    names = ["layer", "sets", "H", "H given the layer before", "I (shuffled)", "adjusted"]
    names += ["guessed right", "switches", "experts kept", "repeat after", "load max/mean"]
    return table(
        f"{found.tokens} tokens in {found.sequences} sequences, {found.top_k:.3g} of"
        f" {found.num_experts} experts per token. Entropies H and mutual information I with the"
        " layer before in bits, of sets of experts; in brackets I between shuffled tokens;"
        " adjusted: share of the information above that. Repeat after: tokens since the same"
        " set, mean.",
        [Column(name) for name in names],
        rows,
    )


def speed_parts(metrics: Metrics) -> list[Html | None]:
    """The calculator: what each measured model can gain at several batch sizes, by formula."""
    weights = metrics.weights
    if weights is None:
        return []
    shares = dict.fromkeys(
        [metrics.active_share, *(d.wanted for d in metrics.divisions)]
        if metrics.active_share is not None
        else [None]
    )
    rows: list[list[Text]] = []
    for share in shares:
        division = division_of(metrics, share)
        for option in options(metrics, share):
            if share != metrics.active_share and option.simplicity < 2:
                continue  # dense rows do not depend on the share
            against = compare(option.score, metrics.dense) if metrics.dense else None
            change = NONE if against is None or option.simplicity == 0 else str(against)
            shown = NONE if option.simplicity < 2 or division is None else f"{division.share:.3g}"
            size = NONE if option.bytes is None else f"{option.bytes / 1e6:,.1f}"
            speeds = [f"{option.speed[b]:.2f}" for b in (None, *BATCHES)]
            rows.append([option.name, shown, change, size, *speeds])
    if len(rows) < 2:
        return []
    words = (
        f"Bounds on the speed-up over the dense model in 16 bits: {FORMULAE}; φ is the share of the"
        f" FFN, {ffn_share_of_bytes(weights):.3f} of the bytes a step reads and"
        f" {ffn_share_of_arithmetic(weights):.3f} of the multiplications at a context of {CONTEXT}"
        " (attention linears, scores and the output projection are the rest; embeddings are read by"
        " the row)."
    )
    parts = [
        f"a = {d.wanted:g}: {d.top_k} of {d.num_experts} experts, s = {d.shared:.3f}"
        for d in metrics.divisions
    ]
    if parts:
        words += f" Divisions: {'; '.join(parts)}."
    columns = [Column("model", ""), Column("a"), Column("perplexity against dense", "")]
    columns += [Column("MB"), Column("arithmetic")]
    columns += [Column(f"memory, batch {b}") for b in BATCHES]
    caption = (
        "By formula, not timed: routers, kernels and caches are not counted, and the choices of a"
        " batch's tokens are taken as independent and even."
    )
    return [paragraph(words), table(caption, columns, rows)]


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f} %"


def _mean(values: Sequence[float | None], factor: float, digits: int = 1) -> str:
    known = [v for v in values if v is not None]
    return f"{factor * sum(known) / len(known):.{digits}f}" if known else NONE
