"""Our solver against decoupleQ's reference algorithm on one layer, in one process.

Shapes: T tokens, O output rows, I inputs.
"""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fissile.config import Effort, Strict
from fissile.eval.memory import growth, reset_peak
from fissile.eval.result import machine, versions
from fissile.kernels import layout
from fissile.quant.decouple import solve
from fissile.quant.decoupleq_dense import decoupleq_dense
from fissile.quant.floats import loss_rows
from fissile.quant.nested import NestedWeight
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.context import peak_rss_bytes

_RATIOS = {"seconds": "time_ratio", "loss": "loss_ratio", "held_out": "held_out_ratio"}


class SolverBench(Strict):
    """Shape of the layer and what is solved; the defaults are a square layer of Llama-2-7B."""

    outputs: int = Field(4096, gt=0, description="rows")
    inputs: int = Field(4096, gt=0, description="columns")
    bits: Literal[2, 3, 4] = 2
    group_size: Literal[32, 64, 128] = 64
    tokens: int = Field(65536, gt=0, description="calibration tokens; half as many are held out")
    decay: float = Field(0.7, ge=0, description="spectrum of the inputs, i^-decay in variance")
    efforts: tuple[Effort, ...] = ("fast",)
    joint: tuple[Effort, ...] = Field(
        (), description="efforts at which 2, 3 and 4 bits are solved jointly and each alone"
    )
    reference: bool = Field(True, description="decoupleQ's algorithm too; slow where I is large")
    seed: int = Field(0, description="of weights and inputs")

    @model_validator(mode="after")
    def _groups_fit(self) -> SolverBench:
        if self.inputs % self.group_size:
            raise ValueError(f"inputs {self.inputs}: not groups of {self.group_size}")
        return self


def bench_solver(settings: SolverBench, progress: Progress) -> dict[str, Any]:
    """Solve one made-up layer with our solver and with decoupleQ's reference algorithm.

    Args:
        settings: sizes and efforts.
        progress: called as (stage, done, total, detail).

    Returns:
        Seconds and relative losses on calibration and on held-out inputs of the reference and of
        every effort, with the ratios to the reference; peak memory in units of weight and Hessian;
        conditions.
    """
    load = os.getloadavg()[0]
    weight_OI, fit_II, held_II = _layer(settings)
    # What a first solve loads is not counted.
    group = settings.group_size
    solve(weight_OI[:1, :group], torch.eye(group), widths=(settings.bits,), group_size=group)
    reference: dict[str, Any] = {}
    if settings.reference:
        began = time.perf_counter()
        dense = decoupleq_dense(weight_OI, fit_II, settings.bits, settings.group_size)
        reference = {"seconds": time.perf_counter() - began, "by_step": dense.seconds}
        reference |= _losses(dense.weight_OI, weight_OI, fit_II, held_II)
        progress("solver", 0, len(settings.efforts), f"reference {reference['seconds']:.1f} s")
    rows: dict[str, Any] = {}
    for effort in settings.efforts:
        nested, row = _solved(settings, effort, (settings.bits,), weight_OI, fit_II)
        row |= _losses(nested.dequantize(settings.bits), weight_OI, fit_II, held_II)
        for key, ratio in _RATIOS.items() if reference else ():
            row[ratio] = row[key] / reference[key]
        rows[effort] = row
        progress("solver", len(rows), len(settings.efforts), f"{effort} {row['seconds']:.1f} s")
    return {
        "reference": reference,
        "ours": rows,
        "joint": {e: _joint(settings, e, weight_OI, fit_II) for e in settings.joint},
        "peak_rss_bytes": peak_rss_bytes(),
        "conditions": {
            **settings.model_dump(),
            "counted": "one layer from weight and Hessian to integers and floats",
            "load_average": {"before": load, "after": os.getloadavg()[0]},
            **machine(),
            "versions": versions(),
        },
    }


def _layer(settings: SolverBench) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian weights; Hessians of calibration and held-out inputs with a decaying spectrum."""
    rng = torch.Generator().manual_seed(settings.seed)
    inputs = settings.inputs
    weight_OI = 0.02 * torch.randn(settings.outputs, inputs, generator=rng)
    basis_II, _ = torch.linalg.qr(torch.randn(inputs, inputs, generator=rng))
    root_II = basis_II * torch.arange(1, inputs + 1).pow(-settings.decay / 2)
    fit_II = _hessian(root_II, settings.tokens, rng)
    return weight_OI, fit_II, _hessian(root_II, settings.tokens // 2, rng)


def _hessian(root_II: Tensor, tokens: int, rng: torch.Generator) -> Tensor:
    """Mean of x x^T over inputs with covariance root root^T."""
    latent_II = torch.zeros_like(root_II)
    for begin in range(0, tokens, len(root_II)):
        z_TI = torch.randn(min(len(root_II), tokens - begin), len(root_II), generator=rng)
        latent_II.addmm_(z_TI.T, z_TI)
    return root_II @ (latent_II / tokens) @ root_II.T


def _losses(
    found_OI: Tensor, weight_OI: Tensor, fit_II: Tensor, held_II: Tensor
) -> dict[str, float]:
    """Loss in units of the output's square, on calibration and on held-out inputs."""
    error_OI, found = found_OI - weight_OI, {}
    for name, h_II in (("loss", fit_II), ("held_out", held_II)):
        size = loss_rows(weight_OI[None], h_II[None]).sum()
        found[name] = float(loss_rows(error_OI[None], h_II[None]).sum() / size)
    return found


def _solved(
    settings: SolverBench,
    effort: Effort,
    widths: tuple[int, ...],
    weight_OI: Tensor,
    hessian_II: Tensor,
) -> tuple[NestedWeight, dict[str, Any]]:
    """Solve for some widths: seconds, and the most memory with weight and Hessian, in their size.

    The memory is None where the system does not count.
    """
    before = reset_peak(weight_OI.device)
    began = time.perf_counter()
    nested = solve(
        weight_OI,
        hessian_II,
        widths=widths,
        group_size=settings.group_size,
        effort=effort,
        seed=settings.seed,
    )
    seconds, grown = time.perf_counter() - began, growth(before, weight_OI.device)
    ratio = None if grown is None else 1 + grown / (weight_OI.nbytes + hessian_II.nbytes)
    return nested, {"seconds": seconds, "memory_ratio": ratio}


def _joint(
    settings: SolverBench, effort: Effort, weight_OI: Tensor, hessian_II: Tensor
) -> dict[str, Any]:
    """Seconds of three widths in one code, and of the same widths one by one."""
    args = (weight_OI, hessian_II)
    row = _solved(settings, effort, layout.NESTED, *args)[1]
    alone = sum(_solved(settings, effort, (k,), *args)[1]["seconds"] for k in layout.NESTED)
    return row | {"alone_seconds": alone, "time_ratio": row["seconds"] / alone}


BENCH = Bench(SolverBench, bench_solver)
