"""Integer step: all widths of a nested code chosen together, one column after the other.

A greedy start (multi-state GPTQ) and a coordinate descent sweep are the same pass. Column j of
width k wants to be the target

    t_kj = w_j - sum_i e_ki F_ij            e_k = W_k - W, the error at width k

and the code is the exact minimiser of sum_k lambda_k (scale_k code_k + zero_k - t_kj)^2.

* start: F is the strictly upper unit factor of H, errors of columns not yet visited are 0;
* descent: F_ij = H_ij / H_jj off the diagonal, errors of all columns: the exact minimum over
  this coordinate, so the objective cannot rise.

Keeping one error a width (and not a shared one) makes both exact for the joint objective.

Shapes: B layers, I inputs, C columns of a block, O output rows, W widths, G groups, Q codes. Rows
are the last dimension, so that every column operation runs over contiguous memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.kernels import layout
from fissile.quant.metric import Metric, take

BLOCK = 64


@dataclass(frozen=True, eq=False)
class Levels:
    """The widths of a code, their centred values and their weights.

    Attributes:
        widths: ascending; the code has as many bits as the last.
        value_WQ: float32, value_k(q) = q >> (b - k), or its entry in the companded table, less the
            mean of the largest and the smallest. Centring keeps scale and zero nearly
            uncorrelated and the float32 costs small.
        weight_W: float32, lambda_k = 4^k omega_k, normalised to sum 1.
        unit_W: float32, steps of the widest width that one step of each width is worth.
        companding: of the table, see `layout.COMPANDED`.
    """

    widths: tuple[int, ...]
    value_WQ: Tensor
    weight_W: Tensor
    unit_W: Tensor
    companding: float = 1.0

    @classmethod
    def build(
        cls,
        widths: tuple[int, ...],
        omega: Mapping[int, float],
        device: torch.device,
        companding: float = 1.0,
    ) -> Levels:
        """Levels of `widths`; 4^k makes omega relative, since a loss falls about 4x a bit."""
        codes_Q = torch.arange(1 << widths[-1], dtype=torch.uint8)
        tables = [layout.values(codes_Q >> (widths[-1] - k), k, companding) for k in widths]
        value_WQ = torch.stack([table.double() - int(table.max()) / 2 for table in tables])
        weight_W = torch.tensor([4.0**k * omega[k] for k in widths], dtype=torch.float64)
        # Least squares of the widest width's values on those of each: 2^(b - k) where they are
        # evenly spaced.
        unit_W = (value_WQ * value_WQ[-1]).sum(1) / value_WQ.square().sum(1)
        return cls(
            widths,
            value_WQ.float().to(device),
            (weight_W / weight_W.sum()).float().to(device),
            unit_W.float().to(device),
            companding,
        )

    def values(self, codes: Tensor) -> Tensor:
        """Centred values (B, N, O) to (B, N, W, O), float32."""
        flat = self.value_WQ.index_select(1, codes.flatten().int())
        return flat.unflatten(1, tuple(codes.shape)).permute(1, 2, 0, 3)


@dataclass(frozen=True, eq=False)
class Floats:
    """Affine maps of all widths around centred codes: W_k = scale_k * value_k + zero_k.

    Attributes:
        scale_BGWO: float32, representable in float16.
        zero_BGWO: float32; zero - scale * (2^k - 1)/2 is representable in float16.
    """

    scale_BGWO: Tensor
    zero_BGWO: Tensor

    def where(self, keep_BO: Tensor, other: Floats) -> Floats:
        """These rows where `keep_BO`, rows of `other` elsewhere."""
        mask = keep_BO[:, None, None, :]
        return Floats(
            torch.where(mask, self.scale_BGWO, other.scale_BGWO),
            torch.where(mask, self.zero_BGWO, other.zero_BGWO),
        )


def start(
    weight_BIO: Tensor, metric: Metric, levels: Levels, floats: Floats, noise: Noise | None = None
) -> Tensor:
    """Multi-state GPTQ from scratch: uint8 codes (B, I, O), columns in visiting order.

    Args:
        weight_BIO: float32, columns in visiting order; (B, I, W, O) for a target a width.
        metric: prepared Hessians.
        levels: widths and weights.
        floats: static groups: the affine maps do not change while columns are compensated.
        noise: perturbs the choices (Klein sampling); None for the greedy rule.
    """
    shape = (*weight_BIO.shape[:2], weight_BIO.shape[-1])
    codes_BIO = torch.empty(shape, dtype=torch.uint8, device=weight_BIO.device)
    error_BIWO = _error_buffer(weight_BIO, levels)
    for a in range(0, weight_BIO.shape[1], BLOCK):
        cols = slice(a, min(a + BLOCK, weight_BIO.shape[1]))
        block = _Block.build(weight_BIO, metric, levels, floats, cols)
        feedback_BIC = metric.feedback_BII[:, : cols.stop, cols]
        block.compensate(feedback_BIC[:, :a], error_BIWO[:, :a])
        if noise:
            block.perturb(noise.gumbel_IQS[cols], noise.temperature, metric.pivot_BI[:, cols])
        codes_BIO[:, cols] = block.choose(feedback_BIC[:, a:], block.zero_BCWO)
        error_BIWO[:, cols] = block.error(codes_BIO[:, cols])
    return codes_BIO


def descend(
    weight_BIO: Tensor,
    metric: Metric,
    levels: Levels,
    floats: Floats,
    codes_BIO: Tensor,
    sweeps: int,
) -> Tensor:
    """Joint coordinate descent: improved uint8 codes (B, I, O), columns in visiting order.

    Args:
        weight_BIO: float32, columns in visiting order; (B, I, W, O) for a target a width.
        metric: prepared Hessians.
        levels: widths and weights.
        floats: affine maps, fixed.
        codes_BIO: uint8, where to start; not changed.
        sweeps: passes over all columns.
    """
    codes_BIO = codes_BIO.clone()
    inputs = weight_BIO.shape[1]
    blocks = [slice(a, min(a + BLOCK, inputs)) for a in range(0, inputs, BLOCK)]
    error_BIWO = _error_buffer(weight_BIO, levels)
    for cols in blocks:
        block = _Block.build(weight_BIO, metric, levels, floats, cols)
        error_BIWO[:, cols] = block.error(codes_BIO[:, cols])
    for _ in range(sweeps):
        for cols in blocks:
            block = _Block.build(weight_BIO, metric, levels, floats, cols)
            feedback_BIC = _descent_feedback(metric, cols)
            block.compensate(feedback_BIC, error_BIWO)
            offset_BCWO = block.zero_BCWO - error_BIWO[:, cols]
            codes_BIO[:, cols] = block.choose(feedback_BIC[:, cols], offset_BCWO)
            error_BIWO[:, cols] = block.error(codes_BIO[:, cols])
    return codes_BIO


@dataclass(frozen=True, eq=False)
class Noise:
    """Gumbel noise on the costs, so that a choice is a sample of the Klein distribution.

    All rows of a copy share the draws: each row is still a fair sample, and results do not depend
    on how rows or layers are split into chunks.

    Attributes:
        gumbel_IQS: float32, S copies of the rows, stacked along them; 0 makes a copy greedy.
        temperature: in units of a row's mean cost of one step, which makes it free of scale.
    """

    gumbel_IQS: Tensor
    temperature: float

    @classmethod
    def draw(
        cls, inputs: int, codes: int, copies: int, temperature: float, generator: torch.Generator
    ) -> Noise:
        """Noise for `copies` stacked copies, the first of which stays greedy."""
        shape = (inputs, codes, copies)
        uniform = torch.rand(shape, generator=generator, device=generator.device)
        gumbel_IQS = uniform.clamp_(1e-7, 1 - 1e-7).log_().neg_().log_()  # added to a cost: negated
        gumbel_IQS[..., 0] = 0
        return cls(gumbel_IQS, temperature)


@dataclass(eq=False)
class _Block:
    """Working state of C columns; `target_BCWO` holds t - zero, the scaled value wanted."""

    scale_BCWO: Tensor
    zero_BCWO: Tensor  # zero - weight: the error at value 0
    target_BCWO: Tensor
    curve_BCWO: Tensor
    slope_BCWO: Tensor
    levels: Levels
    table_QF: Tensor
    gumbel_CQS: Tensor | None = None
    spread_BCSO: Tensor | None = None

    @classmethod
    def build(
        cls, weight_BIO: Tensor, metric: Metric, levels: Levels, floats: Floats, cols: slice
    ) -> _Block:
        group_BC = metric.group_BI[:, cols]
        scale_BCWO = take(floats.scale_BGWO, group_BC)
        wanted_BCWO = weight_BIO[:, cols] if weight_BIO.dim() == 4 else weight_BIO[:, cols, None]
        zero_BCWO = take(floats.zero_BGWO, group_BC) - wanted_BCWO
        slope_BCWO = scale_BCWO * levels.weight_W[:, None]
        curve_BCWO = slope_BCWO * scale_BCWO
        # lambda (s c - y)^2 up to a constant is (lambda s^2) c^2 + (-2 lambda s y) c: the costs of
        # all codes are one small product of this table with the coefficients of a column.
        table_QF = torch.cat([levels.value_WQ.square(), levels.value_WQ]).T.contiguous()
        return cls(
            scale_BCWO,
            zero_BCWO,
            -zero_BCWO,
            curve_BCWO,
            slope_BCWO.mul_(-2),
            levels,
            table_QF,
        )

    def compensate(self, feedback_BNC: Tensor, error_BNWO: Tensor) -> None:
        """Move the targets by the errors of N columns."""
        if feedback_BNC.shape[1]:
            self.target_BCWO.flatten(2).baddbmm_(
                feedback_BNC.transpose(1, 2), error_BNWO.flatten(2), alpha=-1
            )

    def perturb(self, gumbel_CQS: Tensor, temperature: float, pivot_BC: Tensor) -> None:
        """Sample the choices instead of minimising their costs."""
        # A cost of column j counts pivot_j times in the loss, so its temperature is divided by it.
        curve_BCO = self.curve_BCWO.sum(2)
        step_BO = (curve_BCO * pivot_BC[:, :, None]).mean(1)
        scale_BCO = temperature * step_BO[:, None] / pivot_BC[:, :, None]
        copies = gumbel_CQS.shape[2]
        self.gumbel_CQS, self.spread_BCSO = gumbel_CQS, scale_BCO.unflatten(2, (copies, -1))

    def choose(self, feedback_BCC: Tensor, offset_BCWO: Tensor) -> Tensor:
        """Choose the columns one by one; each change moves the targets of the columns after it.

        Args:
            feedback_BCC: F inside the block.
            offset_BCWO: change of the error at value 0, against what `compensate` was given.

        Returns:
            uint8 codes (B, C, O).
        """
        batch, columns, widths, rows = self.target_BCWO.shape
        codes_BCO = torch.empty(
            batch, columns, rows, dtype=torch.uint8, device=self.target_BCWO.device
        )
        coefficients_BCFO = torch.cat([self.curve_BCWO, self.slope_BCWO], dim=2)
        for j in range(columns):
            coefficients_BFO = coefficients_BCFO[:, j]
            coefficients_BFO[:, widths:].mul_(self.target_BCWO[:, j])
            cost_BQO = torch.matmul(self.table_QF, coefficients_BFO)
            if self.gumbel_CQS is not None and self.spread_BCSO is not None:
                cost_BQO.unflatten(2, (self.gumbel_CQS.shape[2], -1)).addcmul_(
                    self.gumbel_CQS[j, :, :, None], self.spread_BCSO[:, j, None]
                )
            best_BO = cost_BQO.min(dim=1).indices  # faster than argmin over a middle dimension
            codes_BCO[:, j] = best_BO
            if j + 1 < columns:
                value_WBO = self.levels.value_WQ.index_select(1, best_BO.view(-1))
                change_BWO = torch.addcmul(
                    offset_BCWO[:, j],
                    self.scale_BCWO[:, j],
                    value_WBO.view(widths, batch, rows).transpose(0, 1),
                )
                self.target_BCWO[:, j + 1 :].addcmul_(
                    feedback_BCC[:, j, j + 1 :, None, None], change_BWO[:, None], value=-1
                )
        return codes_BCO

    def error(self, codes_BCO: Tensor) -> Tensor:
        """Error of every width, (B, C, W, O)."""
        return torch.addcmul(self.zero_BCWO, self.scale_BCWO, self.levels.values(codes_BCO))


def _error_buffer(weight_BIO: Tensor, levels: Levels) -> Tensor:
    batch, inputs, *_, rows = weight_BIO.shape
    return weight_BIO.new_empty(batch, inputs, len(levels.widths), rows)


def _descent_feedback(metric: Metric, cols: slice) -> Tensor:
    """F of coordinate descent for the columns `cols`: (B, I, C), rows in visiting order."""
    order_BC = metric.order_BI[:, cols]
    rows_BCI = take(metric.h_BII, order_BC)
    rows_BCI = rows_BCI.gather(2, metric.order_BI[:, None, :].expand_as(rows_BCI))
    own_BCC = rows_BCI[:, :, cols].diagonal(dim1=1, dim2=2)
    rows_BCI /= own_BCC.clone()[:, :, None]
    rows_BCI[:, :, cols].diagonal(dim1=1, dim2=2).zero_()
    return rows_BCI.transpose(1, 2)
