"""The benchmarks by name. A number is printed with its conditions or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fissile.config import Strict
from fissile.recipe_files import parse_settings
from fissile.registry import Registry

BENCHES = Registry(
    "bench",
    {
        "decode": "fissile.run.bench_decode:BENCH",
        "experts": "fissile.run.bench_experts:BENCH",
        "kernels": "fissile.run.bench_kernels:BENCH",
        "layer": "fissile.run.bench_layer:BENCH",
        "mmlu": "fissile.run.bench_mmlu:BENCH",
        "mixed": "fissile.run.bench_mixed:BENCH",
        "peers": "fissile.run.bench_peers:BENCH",
        "ranks": "fissile.run.bench_ranks:BENCH",
        "solver": "fissile.run.bench_solver:BENCH",
        "speed": "fissile.run.bench_speed:BENCH",
        "widths": "fissile.run.bench_widths:BENCH",
    },
)


@dataclass(frozen=True)
class Bench:
    """One benchmark.

    Attributes:
        settings: what can be told to it; the docstring's first line says what the defaults are.
        run: called with the settings and a display (stage, done, total, detail); returns the row,
            conditions included. Its docstring's first line says what is measured.
    """

    settings: type[Strict]
    run: Callable[[Any, Callable[[str, int, int, str], None]], dict[str, Any]]


def list_benches() -> list[dict[str, Any]]:
    """Name, purpose and settings with their defaults of every benchmark."""
    rows = []
    for name, bench in BENCHES.items():
        purpose = (bench.run.__doc__ or "").splitlines()[0]
        fields = bench.settings.model_fields
        settings = {key: field.default for key, field in fields.items()}
        rows.append({"name": name, "measures": purpose, "settings": settings})
    return rows


def run_bench(
    name: str, overrides: list[str], progress: Callable[[str, int, int, str], None]
) -> dict[str, Any]:
    """Run one benchmark.

    Args:
        name: a name of `BENCHES`.
        overrides: `KEY=VALUE` items over the defaults of its settings.
        progress: called as (stage, done, total, detail).

    Raises:
        UsageError: no such benchmark.
        RecipeError: unknown settings or values out of range.
    """
    bench = BENCHES[name]
    return {"bench": name, **bench.run(parse_settings(bench.settings, overrides), progress)}
