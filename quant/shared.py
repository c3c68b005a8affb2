"""One weight solved by several processes: rows, or experts of a stack, are shared out.

Rows of a weight are independent given the Hessian, and experts of a stack altogether, so every
process solves its own and all get the whole; one process solves everything.

Shapes: O output rows, I inputs, E experts, W widths; "..." leading dimensions, none or (E,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fissile.quant.nested import NestedWeight
from fissile.quant.residual import with_residual
from fissile.quant.solvers import Evidence, Solver, by_width
from fissile.workers import Workers


def solve_shared(
    solver: Solver,
    weight: Tensor,
    original: Tensor,
    evidence: Evidence,
    group_size: int,
    workers: Workers,
    companding: float | None = None,
) -> tuple[NestedWeight, Tensor]:
    """Quantize a weight or a stack, residual included; the same result in every process.

    Args:
        solver: does it.
        weight: float32 (..., O, I), or (W, ..., O, I) with one for every width.
        original: float32 (..., O, I), what 6 and 8 bits shall come near.
        evidence: of the inputs, the same in every process.
        group_size: inputs that share a scale and a zero.
        workers: processes that call this together.
        companding: table of the values; None where the solver is free to choose.

    Returns:
        The weight, and `row_losses` of its nested widths.
    """
    if companding is None and solver.table is not None:
        # Chosen on a few rows of the whole: the shares must not differ.
        chosen = solver.table(weight, evidence, group_size) if workers.main else 1.0
        companding = workers.from_main(chosen)
    stacked = original.dim() == 3 and len(original) >= workers.count
    dim = 0 if stacked else original.dim() - 2
    total = original.shape[dim]
    if workers.count > 1 and total < workers.count:
        workers = Workers.alone(workers.device)
    if workers.count > 1:
        mine = workers.share(total)
        weight, original = (
            x.narrow(dim - original.dim(), mine.start, mine.stop - mine.start)
            for x in (weight, original)
        )
        if stacked:
            drift = {bits: moved[mine] for bits, moved in evidence.drift.items()}
            evidence = Evidence(evidence.hessian[mine], drift)
    nested = solver(weight, evidence, group_size, companding)
    losses = row_losses(nested, by_width(weight, evidence, solver.widths), evidence.hessian)
    if solver.residual:
        # Nothing has to make up for anything there.
        nested = with_residual(nested, original, evidence.hessian, solver.residual)
    if workers.count == 1:
        return nested, losses
    return _gathered(nested, workers, dim, total), workers.gather(losses, dim + 1, total)


def row_losses(nested: NestedWeight, weights: Mapping[int, Tensor], hessian: Tensor) -> Tensor:
    """w H w' of every row of the widest width's weight, then dw H dw' of the error at every width.

    Args:
        nested: codes (..., O, I).
        weights: width to float32 (..., O, I), what it shall come near.
        hessian: float32 (..., I, I).

    Returns:
        float32 (1 + W, ..., O), widths ascending.
    """
    parts = [nested.dequantize(width).sub_(weights[width]) for width in nested.widths]
    parts.insert(0, weights[nested.widths[-1]])
    return torch.stack([((part @ hessian) * part).sum(-1) for part in parts])


def relative_losses(widths: tuple[int, ...], losses: Tensor) -> dict[int, float]:
    """tr(dW H dW') / tr(W H W') for every width.

    Args:
        widths: ascending.
        losses: from `row_losses`, of some or all rows.
    """
    size, *errors = losses.flatten(1).sum(1).tolist()
    return {k: error / max(size, 1e-30) for k, error in zip(widths, errors, strict=True)}


def _gathered(nested: NestedWeight, workers: Workers, dim: int, total: int) -> NestedWeight:
    """All processes' parts as one; what the solver recorded is dropped."""

    def whole(part: Tensor) -> Tensor:
        return workers.gather(part, dim, total)

    return replace(
        nested,
        codes=whole(nested.codes),
        scale={k: whole(x) for k, x in nested.scale.items()},
        zero={k: whole(x) for k, x in nested.zero.items()},
        tied={k: whole(x) for k, x in nested.tied.items()},
        residual=None if nested.residual is None else whole(nested.residual),
        loss={},
        history=torch.empty(0),
    )
