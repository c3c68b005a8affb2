"""`fissile bench kernels`: every product against cuBLAS bf16, grouped_mm, gemlite and humming.

The results of all rows are compared with float64 before the first one is timed. Times are medians
over replays of CUDA graphs, beside the copy bandwidth and matrix rate that the same run measured.
Without a GPU small shapes are computed and compared, but not timed: a "dry" row has no time.
"""

from __future__ import annotations

import datetime
import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fissile.config import Strict
from fissile.errors import QualityGate, UsageError
from fissile.eval.result import code, machine, versions
from fissile.kernels import dispatch
from fissile.kernels.configs import current_table, triton_version
from fissile.kernels.ops import plan_table
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.kernel_cases import (
    DENSE,
    IMPLEMENTATIONS,
    LLAMA_3_8B,
    Case,
    Shape,
    Unavailable,
    tiled_bytes,
)
from fissile.run.kernel_table import draw, readme_table, write_readme, write_rows
from fissile.run.kernel_timing import (
    cache_bytes,
    ceilings,
    launches,
    poison,
    seconds_per_call,
    sets_needed,
)

_LARGEST_ERROR = 1e-2
"""Root mean square error over that of the result: bfloat16 outputs alone make 2e-3."""
_STEP_LAYERS = 32
_DRY = 32

Count = Annotated[int, Field(gt=0)]


class KernelsBench(Strict):
    """Shapes of Llama-3-8B, all widths and batch sizes; dry on small shapes without a GPU."""

    device: Literal["auto", "cuda", "dry"] = Field("auto", description="auto: a GPU if any")
    tokens: tuple[Count, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
    bits: tuple[Literal[2, 3, 4, 8], ...] = (2, 3, 4, 8)
    group_size: Literal[32, 64, 128] = 128
    shapes: tuple[str, ...] = Field((), description="names to measure; default all")
    against: tuple[str, ...] = Field((), description="implementations; default all")
    repeats: int = Field(30, gt=0, description="replays that are measured")
    memory_gb: float = Field(24, gt=0, description="that the rotated weights may take")
    seed: int = Field(0, description="of weights and activations")
    csv: str | None = Field(None, description="file for the rows with all conditions")
    plot: str | None = Field(None, description="file for the plot, .svg or .png")
    readme: str | None = Field(None, description="file whose table of kernels is rewritten")
    tune: str | None = Field(None, description="folder for a table of launch configurations")


def run(settings: KernelsBench, progress: Progress) -> dict[str, Any]:
    """Kernels: time, bandwidth and rate beside the ceilings of the same GPU; errors checked.

    Args:
        settings: shapes, widths and files.
        progress: called as ("check" or "bench", rows done, rows, detail).

    Returns:
        "rows", one a shape, batch, width and implementation; "steps", a whole model's experts;
        "ceilings"; "table" for the README; "conditions".

    Raises:
        UsageError: a name that is none, a GPU that is not there, or tuning without one.
        QualityGate: a result is wrong; nothing more is timed.
    """
    device = _device(settings)
    shapes, names = _chosen(settings, device)
    if settings.tune is not None:
        if device != "cuda":
            raise UsageError("tune needs a GPU")
        from fissile.run.kernel_tune import tune

        tune(settings.tune, settings, shapes, progress)
    tokens = settings.tokens if device == "cuda" else tuple(sorted(settings.tokens)[:3])
    conditions = _conditions(settings, device)
    best = ceilings(device, settings.repeats)
    jobs = [
        (shape, count, bits, name)
        for shape in shapes
        for count in tokens
        for name in names
        for bits in ((16,) if name in DENSE else settings.bits)
    ]
    rows: list[dict[str, Any]] = []
    for done, (shape, count, bits, name) in enumerate(jobs, start=1):
        case = Case(shape, count, bits, settings.group_size, device, 1, settings.seed)
        rows.append(_checked(case, name))
        progress("check", done, len(jobs), f"{shape.name} M={count} {name}")
    if device == "cuda":
        for done, row in enumerate(rows, start=1):
            if "error" in row:
                row |= _timed(settings, row)
            progress("bench", done, len(jobs), f"{row['shape']} M={row['tokens']}")
    _ratios(rows, best)
    steps = list(_steps(settings, device, shapes, best)) if "fissile" in names else []
    result = {
        "rows": rows,
        "steps": steps,
        "ceilings": best,
        "table": readme_table([{**row, "device": conditions["device"]} for row in rows]),
        "conditions": conditions,
    }
    _write(settings, result)
    return result


def _device(settings: KernelsBench) -> str:
    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise UsageError("device cuda: torch sees no GPU (dry runs everything on small shapes)")
    return "cuda" if there and settings.device != "dry" else "cpu"


def _chosen(settings: KernelsBench, device: str) -> tuple[list[Shape], list[str]]:
    known = {shape.name: shape for shape in LLAMA_3_8B}
    for kind, asked, names in (
        ("shapes", settings.shapes, known),
        ("against", settings.against, IMPLEMENTATIONS),
    ):
        if wrong := [name for name in asked if name not in names]:
            raise UsageError(f"{kind} {wrong[0]!r} (known: {', '.join(names)})")
    for file in (settings.csv, settings.plot, settings.readme):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist")
    shapes = [known[name] for name in settings.shapes or known]
    if device != "cuda":
        shapes = [shape.smaller(_DRY) for shape in shapes]
    return shapes, list(settings.against or IMPLEMENTATIONS)


def _checked(case: Case, name: str) -> dict[str, Any]:
    """One implementation of one case, compared with float64 and not timed."""
    shape = case.shape
    row: dict[str, Any] = {
        "shape": shape.name,
        "kind": shape.kind,
        "rows": shape.rows,
        "inputs": shape.inputs,
        "neurons": shape.neurons,
        "experts": shape.experts,
        "top_k": shape.top_k,
        "tokens": case.tokens,
        "bits": case.bits,
        "implementation": name,
        "dry": case.device != "cuda",
    }
    try:
        built = IMPLEMENTATIONS[name](case)
    except Unavailable as why:
        return row | {"note": str(why)}
    poison(case.tokens * max(shape.rows, shape.inputs), case.device)
    error = None if built.truth is None else relative_error(built.calls[0](), built.truth)
    if error is not None and not error <= _LARGEST_ERROR:
        raise QualityGate(
            f"{name} {shape.name} M={case.tokens} {case.bits} bits: error {error:.2g}"
        )
    return row | {"how": built.how, "error": error}


def _timed(settings: KernelsBench, row: dict[str, Any]) -> dict[str, Any]:
    """Time, bandwidth and rate of a row whose result was right."""
    shape = next(shape for shape in LLAMA_3_8B if shape.name == row["shape"])
    group, name = settings.group_size, row["implementation"]
    one = Case(shape, row["tokens"], row["bits"], group, "cuda", 1, settings.seed)
    per_weight = 2 if name in DENSE else (row["bits"] + 32 / group) / 8
    read, held = per_weight * one.weights_read(), per_weight * shape.held()
    sets = sets_needed(read, held, "cuda", int(settings.memory_gb * 1e9))
    built = IMPLEMENTATIONS[name](replace(one, sets=sets))
    median, least = seconds_per_call(built.calls, settings.repeats)
    found = {
        "sets": sets,
        "rotated_over_cache": sets * built.read_bytes / cache_bytes(),
        "us": median * 1e6,
        "least_us": least * 1e6,
        "TBps": built.read_bytes / median / 1e12,
        "TFs": shape.flops(row["tokens"]) / median / 1e12,
        "read_bytes": built.read_bytes,
        "launches": launches(built.calls[0]),
    }
    del built
    gc.collect()
    torch.cuda.empty_cache()
    return found


def relative_error(got: Tensor, want: Tensor) -> float:
    """Root mean square of the error over that of the result; NaN where a value is not finite."""
    return float((got.double() - want).norm() / want.norm())


def _ratios(rows: list[dict[str, Any]], best: dict[str, float | None]) -> None:
    """Add each row's share of the ceilings and its ratio to bf16 and gemlite, where measured."""
    times = {
        (row["shape"], row["tokens"], row["bits"], row["implementation"]): row["us"]
        for row in rows
        if "us" in row
    }
    for row in rows:
        if "us" not in row:
            continue
        where = row["shape"], row["tokens"]
        for name in IMPLEMENTATIONS:
            bits = 16 if name in DENSE else row["bits"]
            other = times.get((*where, bits, name))
            row[f"vs_{name}"] = other / row["us"] if other is not None else None
        for key, ceiling in (("TBps", best["copy_TBps"]), ("TFs", best["bf16_TFs"])):
            row[f"share_of_{key}"] = row[key] / ceiling if ceiling else None


def _steps(
    settings: KernelsBench, device: str, shapes: list[Shape], best: dict[str, float | None]
) -> Iterator[dict[str, Any]]:
    """The experts of a whole model in one graph, one routing decision for all layers."""
    layers = _STEP_LAYERS if device == "cuda" else 2
    for shape in shapes:
        for bits in settings.bits if shape.kind == "experts" else ():
            case = Case(shape, 1, bits, settings.group_size, device, layers, settings.seed)
            x, route = case.activations(), case.route()
            pairs = [case.pair(2 + i) for i in range(layers)]

            def step(
                x: Tensor = x, route: tuple[Tensor, Tensor] = route, pairs: Any = pairs
            ) -> Tensor:
                with dispatch.one_step():
                    for wide, narrow in pairs:
                        x = dispatch.experts(x, route, wide, narrow, "silu")
                return x

            row = {
                "shape": shape.name,
                "layers": layers,
                "tokens": 1,
                "bits": bits,
                "dry": device != "cuda",
            }
            if device != "cuda":
                step()
                yield row
                continue
            median, least = seconds_per_call([step], settings.repeats)
            read = layers * tiled_bytes(case, pairs[0])
            copy = best["copy_TBps"]
            sort = partial(plan_table, *route, shape.experts, pairs[0][0].kernel_bits)
            count, once = launches(step), launches(sort)
            yield row | {
                "us": median * 1e6,
                "least_us": least * 1e6,
                "floor_us": read / copy / 1e6 if copy else None,
                "over_floor": median * copy * 1e12 / read if copy else None,
                "launches_per_layer": (count - once) / layers,
                "launches_once": once,
            }


def _conditions(settings: KernelsBench, device: str) -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if device == "cuda" else "cpu (dry)"
    return {
        "device": gpu,
        "driver_cuda": torch.version.cuda,
        "triton": triton_version(),
        "table": current_table().name,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "timing": "median of CUDA graph replays over rotated weights"
        if device == "cuda"
        else "dry",
        **settings.model_dump(exclude={"csv", "plot", "readme", "tune"}),
        "code": code(),
        "versions": versions(),
        **machine(),
    }


def _write(settings: KernelsBench, result: dict[str, Any]) -> None:
    if settings.csv is not None:
        write_rows(Path(settings.csv), result)
    if settings.plot is not None:
        draw(Path(settings.plot), result)
    if settings.readme is not None:
        write_readme(Path(settings.readme), result["table"])


BENCH = Bench(KernelsBench, run)
