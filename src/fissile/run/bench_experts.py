"""`fissile bench experts`: one recipe over several calibration seeds, every control in each run."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from pydantic import Field

from fissile.config import Strict
from fissile.errors import UsageError
from fissile.recipe_files import find_recipe, load_recipe
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.gap import OWN_ORACLE
from fissile.run.metrics import Metrics, Score, read_metrics

Key = tuple[str, float, str]
"""System, active share, recovery."""


class ExpertsBench(Strict):
    """Recipe, model, text and seeds; the demo's recipe for experts unless told otherwise."""

    models: tuple[str, ...] = Field((), description="the dense model's folder")
    recipe: str = Field("demo/experts", description="name or file of a recipe with its controls")
    calibration: str | None = Field(None, description="JSONL; default the recipe's")
    held_out: str | None = Field(None, description="JSONL; default the recipe's")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="of calibration text and all else")
    folder: str = Field("runs/experts", description="run folders, one a seed; kept and resumed")
    change: tuple[str, ...] = Field((), description="KEY=VALUE items over the recipe")
    later: tuple[str, ...] = Field(
        (), description="more such items for all seeds but 0, e.g. fewer controls"
    )


def run(settings: ExpertsBench, progress: Progress) -> dict[str, Any]:
    """Quality of experts and routers: ln ppl over the dense model's, mean over domains and seeds.

    Args:
        settings: recipe, model, text and seeds.
        progress: called as (stage, done, total, detail).

    Returns:
        "rows" (see `gap_rows`), "domain_matrices" (of Read-ME's experts, with the seed), "dense",
        "seeds", "recipe" and "conditions".

    Raises:
        UsageError: no model or no seeds; and what a run raises.
    """
    from fissile.eval.documents import sha256_files
    from fissile.eval.result import machine, model_sha256, versions
    from fissile.run.pipeline import run_recipe

    if len(settings.models) != 1 or not settings.seeds:
        raise UsageError("experts needs one model and seeds: fissile bench experts MODEL_DIR")
    found: list[Metrics] = []
    items = list(settings.change)
    for key, value in (("calibrate", settings.calibration), ("evaluate", settings.held_out)):
        items += [f"{key}.data={value}"] if value is not None else []
    path = find_recipe(settings.recipe)
    recipe = load_recipe(path, items)
    for seed in settings.seeds:
        out = Path(settings.folder) / f"seed_{seed}"
        own = [*items, f"seed={seed}", *(settings.later if seed else ())]
        seeded = load_recipe(path, own)
        resume = (out / "recipe.yaml").exists()
        run_recipe(seeded, settings.models[0], out, resume=resume, progress=progress)
        found.append(read_metrics(out / "metrics.json"))
    dense = [metrics.dense.ppl for metrics in found if metrics.dense is not None]
    told, text = recipe.model_dump(mode="json"), {}
    for section in ("calibrate", "evaluate"):
        if file := told[section]["data"]:
            told[section]["data"] = Path(file).name
            text[section] = sha256_files([Path(file)])
    return {
        "recipe": told,
        "later": list(settings.later),
        "seeds": list(settings.seeds),
        "dense": dense,
        "rows": gap_rows(found),
        "domain_matrices": [
            matrix.model_dump() | {"seed": seed, "own_is_best": matrix.own_is_best()}
            for seed, metrics in zip(settings.seeds, found, strict=True)
            for matrix in metrics.domain_matrices
        ],
        "conditions": {
            "model_sha256": model_sha256(Path(settings.models[0])),
            "text_sha256": text,
            "versions": versions(),
            **machine(),
        },
    }


def gap_rows(found: list[Metrics]) -> list[dict[str, Any]]:
    """One row per system, active share and recovery, over runs with different seeds.

    gap = mean over domains of ln ppl - ln ppl(dense). Ratios are over the runs that have both
    systems, and missing where the other lacks one. "of_static" divides it by static pruning's
    without recovery, layers alike ("static_uniform") or not ("static"). "closed" is the share of
    the way from static pruning to the oracle on the same experts, before recovery.

    Args:
        found: metrics of the runs.
    """
    gaps: dict[Key, dict[int, dict[str, float]]] = defaultdict(dict)
    active: dict[Key, list[float | None]] = defaultdict(list)
    for run, metrics in enumerate(found):
        if metrics.dense is None:
            continue
        for v in metrics.variants:
            gaps[v.name, v.share, v.recovery][run] = _by_domain(v, metrics.dense)
            active[v.name, v.share, v.recovery].append(v.measured_share)
    means = {
        key: {run: statistics.fmean(domains.values()) for run, domains in runs.items()}
        for key, runs in gaps.items()
    }
    return [
        _row(key, list(runs.values()), means) | _active(active[key]) for key, runs in gaps.items()
    ]


def _active(shares: list[float | None]) -> dict[str, Any]:
    """Share of FFN neurons that was computed on the held-out text, mean over seeds."""
    known = [share for share in shares if share is not None]
    return {"measured_share": statistics.fmean(known)} if known else {}


def _by_domain(score: Score, dense: Score) -> dict[str, float]:
    """ln ppl - ln ppl(dense) of every domain that both were measured on."""
    found = {}
    for name, ppl in score.by_domain.items():
        base = dense.by_domain.get(name)
        if ppl and base:
            found[name] = math.log(ppl / base)
    return found


def _row(
    key: Key, seeds: list[dict[str, float]], means: dict[Key, dict[int, float]]
) -> dict[str, Any]:
    name, share, recovery = key
    own = list(means[key].values())
    row: dict[str, Any] = {
        "system": name,
        "share": share,
        "recovery": recovery,
        "gap": statistics.fmean(own),
        "gap_by_seed": own,
        "gap_sd": statistics.stdev(own) if len(own) > 1 else None,
        "by_domain": {d: statistics.fmean(s[d] for s in seeds) for d in seeds[0]},
    }

    def beside(other: str) -> float | None:
        """Mean gap of another system over the same runs."""
        known = means.get((other, share, "none"), {})
        shared = [known[run] for run in means[key] if run in known]
        return statistics.fmean(shared) if len(shared) == len(own) else None

    for static in ("static_uniform", "static"):
        if base := beside(static):
            row[f"of_{static}"] = row["gap"] / base
    base, best = beside("static"), beside(OWN_ORACLE.get(name, ""))
    if recovery == "none" and base is not None and best is not None:
        whole = base - best
        row["closed"] = (base - row["gap"]) / whole if whole > 0 else None
    return row


BENCH = Bench(ExpertsBench, run)
