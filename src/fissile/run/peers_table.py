"""Rows of `fissile bench peers`: single measurements to one row a system, ours beside theirs."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from fissile.run.peers import RECIPES


class Measured(NamedTuple):
    """One system at one width and seed: its place in the table and what was found."""

    key: tuple[str, str | None, int, int]
    found: dict[str, Any]


def table(measured: list[Measured]) -> list[dict[str, Any]]:
    """One row per system, effort, width and group size, over the seeds; by width, best first.

    "gap" is the mean over seeds of the mean over domains of ln ppl - ln ppl(dense). Beside a system
    of ours stand two of the peers of its width: "best_peer" has the smallest gap at its group size,
    "best_peer_at_cost" the smallest of all group sizes among those that take no fewer bits per
    weight. "of_best_peer" and "of_best_peer_at_cost" are the ratios of gaps; "of_dedicated",
    "of_decoupleq" and "of_gptq" those to our own of the same width and group size (dedicated of the
    same effort).

    Args:
        measured: single results; those with "missing" give a row with the reason.
    """
    cells: dict[tuple[str, str | None, int, int], list[dict[str, Any]]] = {}
    for key, found in measured:
        cells.setdefault(key, []).append(found)
    rows = [_row(key, found) for key, found in cells.items()]
    peers = [row for row in rows if row["by"] == "peer" and "gap" in row]
    for row in rows:
        if row["by"] == "peer" or "gap" not in row:
            continue
        rivals = [other for other in peers if other["bits"] == row["bits"]]
        alike = [other for other in rivals if other["group_size"] == row["group_size"]]
        as_dear = [o for o in rivals if o["bits_per_weight"] >= row["bits_per_weight"] - 1e-9]
        for name, against in (("best_peer", alike), ("best_peer_at_cost", as_dear)):
            best = min(against, key=lambda other: float(other["gap"]), default=None)
            if best is not None and best["gap"] > 0:
                row |= {name: best["system"], f"of_{name}": row["gap"] / best["gap"]}
        row |= _of_ours(row, rows)
    return sorted(rows, key=lambda r: (r["bits"], r["group_size"], r.get("gap", float("inf"))))


def _of_ours(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ratios of a row's gap to those of our own baselines."""
    found = {}
    for other in rows:
        name, alike = other["system"], all(other[k] == row[k] for k in ("bits", "group_size"))
        wanted = name in ("decoupleq", "gptq")
        wanted |= name == "dedicated" and other.get("effort") == row.get("effort")
        if wanted and alike and name != row["system"] and other.get("gap", 0.0) > 0:
            found[f"of_{name}"] = row["gap"] / other["gap"]
    return found


def _row(key: tuple[str, str | None, int, int], found: list[dict[str, Any]]) -> dict[str, Any]:
    system, effort, bits, group = key
    by = "peer" if system in RECIPES else "fissile"
    row: dict[str, Any] = {"system": system, "by": by, "bits": bits, "group_size": group}
    if effort is not None:
        row["effort"] = effort
    done = [one for one in found if "gap" in one]
    if reasons := sorted({one["missing"] for one in found if "missing" in one}):
        row["missing"] = "; ".join(reasons)
    if not done:
        return row
    gaps = [one["gap"] for one in done]
    by_domain = [one["by_domain"] for one in done]
    row |= {
        "gap": statistics.fmean(gaps),
        "gap_by_seed": gaps,
        "gap_sd": statistics.stdev(gaps) if len(gaps) > 1 else None,
        "ppl_by_domain": {d: _mean([s[d] for s in by_domain]) for d in by_domain[0]},
        "bits_per_weight": done[0]["bits_per_weight"],
    }
    for name in ("seconds", "processor_seconds"):
        if all(name in one for one in done):
            row[name] = statistics.fmean(one[name] for one in done)
    return row | {k: done[0][k] for k in ("settings", "versions") if k in done[0]}


def _mean(values: list[float | None]) -> float | None:
    """None where a model was broken."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None
