"""Tables of stored results, from eval/results/*.json: every number in them is read, none is typed.

    python docs/tools/result_tables.py        rewrites the tables of README.md

A page of docs asks for one with `<!-- table: NAME -->`; in the README it stands between that and
`<!-- end of table -->`. A test compares.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from typing import Any

import cost_tables
from stored_results import ROOT, number, stored, table

SYSTEMS = {
    "static_uniform": "static pruning, all layers alike",
    "static": "static pruning",
    "random": "random choices among the same experts",
    "pregate": "pre-gating router, one decision for all layers",
    "pregate_dynamic": "the same, varying number of experts",
    "per_layer": "pre-gating router, a head per layer",
    "per_layer_dynamic": "the same, varying number of experts",
    "ridge": "linear routers inside the layers",
    "dynamic": "the same, varying number of experts",
    "oracle": "oracle on the experts of the pre-gating router",
    "oracle_per_layer": "oracle, a decision per layer",
    "oracle_layerwise": "oracle on the experts of the linear routers",
    "cmoe": "CMoE's conversion",
}
METHODS = {
    "nested": "nested, one file for all widths",
    "dedicated": "the same solver, one width alone",
    "gptq": "GPTQ",
    "rtn": "round to nearest",
}
OURS = {
    "dedicated": "ours, one width",
    "decoupleq": "decoupleQ's method, our code",
    "gptq": "GPTQ, our code",
    "nested": "ours, 2, 3 and 4 bits in one code",
}
STEPS = ("none", "refit", "trained")


def fill(markdown: str) -> str:
    """Replace every request for a table.

    Raises:
        KeyError: a page asks for a table that does not exist.
    """
    return re.sub(r"<!-- table: ([\w-]+) -->", lambda found: TABLES[found[1]](), markdown)


def refreshed(markdown: str) -> str:
    """Replace every table by the same one made anew.

    Raises:
        KeyError: there is no table of that name.
    """
    return re.sub(
        r"(<!-- table: ([\w-]+) -->\n).*?(?=<!-- end of table -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n",
        markdown,
        flags=re.DOTALL,
    )


def demo_routing() -> str:
    """Perplexity of the demo model at half of the FFN."""
    data = stored("demo")
    found = {(v["name"], v["recovery"]): v["ppl"] for v in data["variants"]}
    names = dict.fromkeys(v["name"] for v in data["variants"])
    rows = [
        [SYSTEMS.get(n, n), *(number(found.get((n, step)), 2) for step in STEPS)] for n in names
    ]
    return table(["half of the FFN", "as converted", "re-fit", "trained"], rows) + (
        f"\n\nDense: {data['dense']['ppl']:.2f} (standard error over documents"
        f" {data['dense']['stderr']:.1f}; all rows are of the same documents)."
        f" {_demo_conditions(data)}"
    )


def demo_widths() -> str:
    """Perplexity of the demo model in fewer bits."""
    data = stored("demo")
    found = {(w["method"], w["of"], w["bits"]): w for w in data["widths"]}
    bits = sorted({w["bits"] for w in data["widths"] if w["bits"]})
    rows = [
        [label, *(number(found[method, "converted", b]["ppl"], 2) for b in bits)]
        for method, label in METHODS.items()
    ]
    dense = [number(found["nested", "dense", b]["ppl"], 2) for b in bits]
    rows.append(["nested, dense model without routing", *dense])
    nested = [found["nested", "converted", b] for b in bits]
    sizes = [f"{w['bits_per_weight']:g}" for w in nested]
    rows.append(["bits per weight with scales and zeros", *sizes])
    rows.append(["MB that a load reads (nested)", *(f"{w['bytes'] / 1e6:.1f}" for w in nested)])
    floats = found["float", "converted", None]
    return table(["", *(f"{b} bits" for b in bits)], rows) + (
        f"\n\nThe converted model in floats, which was quantized: {floats['ppl']:.2f},"
        f" {floats['bytes'] / 1e6:.1f} MB. {_demo_conditions(data)}"
    )


def demo_stages() -> str:
    """Where the time of the demo goes."""
    data = stored("demo")
    rows = [
        [s["name"], f"{s['seconds']:.1f}", f"{s['peak_rss_bytes'] / 1e9:.2f}"]
        for s in data["stages"]
    ]
    return table(["stage", "seconds", "peak memory so far, GB"], rows)


def _demo_conditions(data: dict[str, Any]) -> str:
    return (
        f"Conditions: {data['model']}, recipe `{data['recipe']}`, seed {data['seed']}, one run;"
        f" {data['text']}; {data['machine']}; commit {data['commit']}, {data['date']}."
    )


def experts() -> str:
    """Distance to the dense model, by system and active share."""
    data = stored("experts")
    return _gaps(data) + "\n\n" + _gap_conditions(data)


def recovery() -> str:
    """The same after distillation."""
    half, most = stored("recovery"), stored("recovery_75")
    both = half | {"rows": [*half["rows"], *most["rows"]]}
    tokens = half["recipe"]["recover"]["tokens"]
    return _gaps(both) + f"\n\nTrained on {tokens:,} tokens. " + _gap_conditions(half)


def quantizers() -> str:
    """Ours and rivals at equal text, bits per weight counted."""
    data = stored("quantizers")
    rows = sorted(data["rows"], key=lambda r: (r["bits"], r["gap"]))
    lines = [
        [
            f"**{OURS[row['system']]}**" if row["by"] == "fissile" else row["system"],
            str(row["bits"]),
            str(row["group_size"]),
            f"{row['bits_per_weight']:.2f}",
            *(number(gap, 4) for gap in [*row["gap_by_seed"], None, None][:3]),
        ]
        for row in rows
    ]
    residual, alone = data["nested_residual_fast"], data["without_generated_text"]
    plain = "; ".join(
        f"{name} {', '.join(f'{gap:.4f}' for gap in gaps)}" for name, gaps in alone.items()
    )
    head = ["", "bits", "group", "bits a weight", "gap, seed 0", "seed 1", "seed 2"]
    return table(head, lines) + (
        "\n\nGap: mean over domains of ln ppl - ln ppl(dense). Ours at effort best, which adds"
        " twice as much text as was given, written by the dense model; all others have the given"
        " text alone; auto-round with zero points, and 200 steps where it is not `best`, which has"
        " 1,000; `neuqi` searches its grids first. Empty: not run."
        f" Ours without that text: {plain}."
        f" Residual planes at effort fast: {residual['6']:.4f} at 6 bits, {residual['8']:.4f} at 8."
    )


def mixed() -> str:
    """One nested code at one width for all and at mixed widths."""
    data = stored("mixed")
    rows = [
        [
            f"budget of {row['budget']:g}" if row["budget"] else "one width",
            f"{row['bits_per_weight']:.2f}",
            f"{row['gap']:.4f}",
            number(row["line"], 4),
        ]
        for row in sorted(data["rows"], key=lambda row: row["bits_per_weight"])
    ]
    how = data["conditions"]
    return table(["", "bits a weight", "gap", "on the line between widths"], rows) + (
        f"\n\nBits count scales and zeros. Conditions: the demo model, effort {how['effort']},"
        f" {how['tokens']:,} calibration tokens, {how['held_out_tokens']:,} held-out tokens, seed"
        f" {how['seed']}; torch {how['versions']['torch']}."
    )


def domain_matrix() -> str:
    """Perplexity of every domain in every domain's expert, as in Read-ME's figure."""
    data = stored("domain_matrix")
    seeds = [m for m in data["domain_matrices"] if m["share"] == 0.5]
    domains = seeds[0]["domains"]
    rows = []
    for i, expert in enumerate(domains):
        row = []
        for j in range(len(domains)):
            ppl = statistics.fmean(m["ppl"][i][j] for m in seeds)
            row.append(f"**{ppl:.2f}**" if i == j else f"{ppl:.2f}")
        rows.append([f"expert of {expert}", *row])
    best = sum(all(m["own_is_best"]) for m in seeds)
    return table(["", *domains], rows) + (
        f"\n\nMeans over seeds {', '.join(str(m['seed']) for m in seeds)}; in {best} of"
        f" {len(seeds)} every domain is best in its own expert. Conditions: an expert a domain,"
        f" half of the FFN, {data['recipe']['calibrate']['tokens']:,} calibration tokens,"
        f" {data['recipe']['evaluate']['tokens']:,} held-out tokens."
    )


def _gaps(data: dict[str, Any]) -> str:
    found = {(r["system"], r["share"], r["recovery"]): r for r in data["rows"]}
    names = [n for n in SYSTEMS if any(r["system"] == n for r in data["rows"])]
    columns = [
        (share, step)
        for share in sorted({r["share"] for r in data["rows"]})
        for step in STEPS
        if any((n, share, step) in found for n in names)
    ]
    said = {"none": "as converted", "refit": "re-fit", "trained": "trained"}
    head = ["", *(f"{share:.0%}, {said[step]}" for share, step in columns)]
    rows = [[SYSTEMS[n], *(_spread(found.get((n, *c))) for c in columns)] for n in names]
    if any(_closed(row) for row in found.values()):
        head.append("oracle's gap closed")
        for name, row in zip(names, rows, strict=True):
            row.append(_closed(found.get((name, columns[0][0], "none"))))
    return table(head, rows)


def _spread(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['gap']:.4f}" + (f" ± {row['gap_sd']:.4f}" if row["gap_sd"] else "")


def _closed(row: dict[str, Any] | None) -> str:
    closed = (row or {}).get("closed")
    return "" if closed is None else f"{closed:.0%}"


def _gap_conditions(data: dict[str, Any]) -> str:
    recipe, how = data["recipe"], data["conditions"]
    extract = recipe["extract"]
    return (
        f"Conditions: {extract['num_experts']} experts of which {extract['top_k']} are chosen,"
        f" {recipe['calibrate']['tokens']:,} calibration tokens,"
        f" {recipe['evaluate']['tokens']:,} held-out tokens in {len(data['rows'][0]['by_domain'])}"
        f" domains, seeds {', '.join(map(str, data['seeds']))};"
        f" torch {how['versions']['torch']}, {how['threads']} thread."
    )


def token_widths() -> str:
    """Widths chosen for each token beside a width per expert and one width for all."""
    data = stored("widths")
    how = data["conditions"]
    lines = [
        [row["method"], f"{row['wanted_bits']:g}", f"{row['bits']:.2f}", f"{row['gap']:.4f}"]
        for row in data["rows"]
    ]
    return table(["widths of experts", "wanted bits", "bits", "gap"], lines) + (
        f"\n\nGap: mean over domains of ln ppl - ln ppl(4 bits). Conditions: {how['tokens']:,}"
        f" calibration tokens, {how['held_out_tokens']:,} held-out tokens, {how['steps']} steps,"
        f" seed {how['seed']}; torch {how['versions']['torch']}, {how['threads']} thread."
    )


def router_ideas() -> str:
    """What was tried to bring one early decision nearer to its oracle."""
    data = stored("router_ideas")
    how = data["conditions"]
    rows = [[f"*{row['system']}*", row] for row in data["bounds"]]
    rows += [[row["idea"], row] for row in data["ideas"] if "gap" in row or "mass" in row]
    lines = [
        [name, *(number(row.get(key), digits) for key, digits in (("gap", 4), ("mass", 3)))]
        for name, row in rows
    ]
    return table(["", "gap", "mass"], lines) + (
        f"\n\nKept: {data['kept']}. Conditions: {how['model']}; {how['calibration_tokens']:,}"
        f" calibration tokens, {how['held_out_tokens']:,} held-out tokens, seed {how['seed']};"
        f" {how['measure']}; {how['note']}."
    )


TABLES: dict[str, Callable[[], str]] = cost_tables.TABLES | {
    "demo-routing": demo_routing,
    "demo-widths": demo_widths,
    "demo-stages": demo_stages,
    "experts": experts,
    "recovery": recovery,
    "domain-matrix": domain_matrix,
    "quantizers": quantizers,
    "mixed": mixed,
    "token-widths": token_widths,
    "router-ideas": router_ideas,
}


def main() -> None:
    """Rewrite the tables of README.md."""
    path = ROOT / "README.md"
    path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
