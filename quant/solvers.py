"""What turns a weight into integers, and what it is told about the layer.

Shapes: I inputs, O output rows, W widths; "..." leading dimensions (experts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fissile.config import BlockStage
from fissile.kernels.layout import STORED_BITS
from fissile.quant.nested import NestedWeight


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is known of the inputs of a weight.

    Attributes:
        hessian: float32 (..., I, I), mean of x x^T over the quantized model's inputs x.
        drift: width to float32 (..., I, I), mean of (y - x) x^T with the float model's inputs y
            and those of the quantized model at that width; empty where it was not measured.
    """

    hessian: Tensor
    drift: Mapping[int, Tensor] = field(default_factory=dict)


Solve = Callable[[Tensor, Evidence, int, float | None], NestedWeight]
"""Weight (..., O, I), or (W, ..., O, I) with one for every width; evidence, group size and table
(None: free to choose) to a nested weight."""


@dataclass(frozen=True)
class Solver:
    """A way to quantize.

    Attributes:
        widths: that it makes, of 2, 3 and 4.
        drift: whether it wants to know the drift.
        solve: does it.
        block: training of each block between the solves; None or 0 steps for none.
        seed: of the order of windows in that training.
        residual: of 6 and 8, those to add when a layer is finished.
        sensitivity: measure what each weight at each width costs its block.
        table: chooses the table of the values for a weight or stack; None if there is no choice.
    """

    widths: tuple[int, ...]
    drift: bool
    solve: Solve
    block: BlockStage | None = None
    seed: int = 0
    residual: tuple[int, ...] = ()
    sensitivity: bool = False
    table: Callable[[Tensor, Evidence, int], float] | None = None

    @property
    def moving(self) -> tuple[int, ...]:
        """Widths whose floats may move once they are solved: a residual adds to the others'."""
        return tuple(k for k in self.widths if not (self.residual and k == STORED_BITS))

    def __call__(
        self, weight: Tensor, evidence: Evidence, group_size: int, companding: float | None = None
    ) -> NestedWeight:
        """Quantize one weight or a stack, see `Solve`."""
        return self.solve(weight, evidence, group_size, companding)


def float_targets(
    weight: Tensor, evidence: Evidence, blend: float, damp: float
) -> dict[int, Tensor]:
    """What each width shall come near so that outputs come near those of the float model.

    min |W y - V x|^2 over V has the solution V = W E[y x^T] H^-1 = W + W E[(y - x) x^T] H^-1: the
    weight that makes up for what the inputs have drifted. `blend` of that change is taken, since
    all of it fits the calibration text too well (GPTAQ's setting, arXiv 2504.02692).

    Args:
        weight: float (..., O, I), or (W, ..., O, I) with one for every width, ascending.
        evidence: with the drift of every width.
        blend: 0 to 1.
        damp: ridge in units of the mean diagonal.

    Returns:
        Width to float32 (..., O, I).
    """
    hessian = evidence.hessian.double()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    ridge = damp * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float64).tiny
    hessian = hessian + torch.diag_embed(ridge.expand_as(diagonal))
    factor = torch.linalg.cholesky(hessian)
    targets = {}
    for bits, own in by_width(weight, evidence, sorted(evidence.drift)).items():
        change = own.double() @ evidence.drift[bits].double()
        # H is symmetric: V H = change is H V^T = change^T.
        change = torch.cholesky_solve(change.mT, factor).mT
        targets[bits] = (own.double() + blend * change).float()
    return targets


def by_width(weight: Tensor, evidence: Evidence, widths: Sequence[int]) -> dict[int, Tensor]:
    """A weight (..., O, I) for every width, or each its own of (W, ..., O, I)."""
    shared = weight.dim() == evidence.hessian.dim()
    return dict(zip(widths, [weight] * len(widths) if shared else weight, strict=True))
