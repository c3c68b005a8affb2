"""Streaming second moments of pairs (x, y) and the least-squares fits they allow.

Shapes: T tokens, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ROWS = 4096
"""Tokens per matrix product: float32 rounding inside one product stays far below sampling noise."""
_BLOCK = 512
"""Columns per block of a symmetric product."""
_CACHED = 128
"""Tokens per float64 copy: few enough that it stays in the processor's cache."""


def gram(x_TI: Tensor) -> Tensor:
    """x^T x, (I, I), in the dtype of x."""
    width = x_TI.shape[1]
    gram_II = x_TI.new_empty(width, width)
    # Blocks on and above the diagonal only: nearly half the work.
    for begin in range(0, width, _BLOCK):
        block = x_TI[:, begin : begin + _BLOCK].T @ x_TI[:, begin:]
        gram_II[begin : begin + _BLOCK, begin:] = block
        gram_II[begin:, begin : begin + _BLOCK] = block.T
    return gram_II


def _shifted(x_TI: Tensor, shift_I: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x - shift in `dtype`, and its sums over tokens in float64."""
    low_TI = torch.empty(x_TI.shape, dtype=dtype, device=x_TI.device)
    sum_I = torch.zeros_like(shift_I)
    for begin in range(0, len(x_TI), _CACHED):
        rows = slice(begin, begin + _CACHED)
        x64 = x_TI[rows].double() - shift_I
        sum_I += x64.sum(0)
        low_TI[rows] = x64
    return low_TI, sum_I


class Moments:
    """Float64 sums over tokens of x, y, x x^T, y x^T and ||y||^2, and the ridge fits they allow.

    Products are taken about the first chunk's mean: activations with a large constant part would
    otherwise lose their variance to cancellation.

    Args:
        inputs: I, the width of x.
        outputs: O, the width of y.
        device: where the sums live.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        if inputs < 1 or outputs < 1:
            raise ValueError(f"inputs {inputs} and outputs {outputs} must be at least 1")

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.count = 0
        self.shift_I, self.shift_O = zeros(inputs), zeros(outputs)
        self.sum_I, self.sum_O = zeros(inputs), zeros(outputs)
        self.xx_II, self.yx_OI, self.yy = zeros(inputs, inputs), zeros(outputs, inputs), zeros()

    def add(self, x_TI: Tensor, y_TO: Tensor) -> None:
        """Add T tokens. Float64 inputs are multiplied in float64, all others in float32.

        Args:
            x_TI: inputs (T, I).
            y_TO: outputs (T, O), the same tokens.

        Raises:
            ValueError: the shapes do not fit, or a value is not finite.
        """
        if x_TI.shape != (len(y_TO), len(self.sum_I)) or y_TO.shape[1:] != self.sum_O.shape:
            raise ValueError(
                f"x {tuple(x_TI.shape)} and y {tuple(y_TO.shape)} do not match "
                f"(T, {len(self.sum_I)}) and (T, {len(self.sum_O)})"
            )
        if not len(x_TI):
            return
        if self.count == 0:
            self.shift_I, self.shift_O = x_TI.double().mean(0), y_TO.double().mean(0)
        dtype = torch.promote_types(torch.promote_types(x_TI.dtype, y_TO.dtype), torch.float32)
        for x, y in zip(x_TI.split(_ROWS), y_TO.split(_ROWS), strict=True):
            x_low, sum_I = _shifted(x, self.shift_I, dtype)
            y_low, sum_O = _shifted(y, self.shift_O, dtype)
            if not (torch.isfinite(sum_I).all() and torch.isfinite(sum_O).all()):
                raise ValueError("activations hold NaN or infinite values")
            self.sum_I += sum_I
            self.sum_O += sum_O
            self.yy += y_low.double().square().sum()
            self.xx_II += gram(x_low)
            self.yx_OI += (y_low.T @ x_low).double()
        self.count += len(x_TI)

    def merge(self, other: Moments) -> None:
        """Add the tokens of `other`; the result does not depend on where the stream was cut."""
        if other.count == 0:
            return
        if self.count == 0:
            self.shift_I, self.shift_O = other.shift_I.clone(), other.shift_O.clone()
        sums = other._about(self.shift_I, self.shift_O)
        self.count += other.count
        for name, value in zip(("sum_I", "sum_O", "xx_II", "yx_OI", "yy"), sums, strict=True):
            setattr(self, name, getattr(self, name) + value)

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on later, as tensors."""
        names = ("shift_I", "shift_O", "sum_I", "sum_O", "xx_II", "yx_OI", "yy")
        return {"count": torch.tensor(self.count), **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Moments:
        """Inverse of `state`."""
        self = cls(len(state["sum_I"]), len(state["sum_O"]), state["sum_I"].device)
        self.count = int(state["count"])
        for name, value in state.items():
            if name != "count":
                setattr(self, name, value.clone())
        return self

    def mean_O(self) -> Tensor:
        """E[y], (O,) float64."""
        return self.shift_O + self.sum_O / self.count

    def solve(
        self, ridge: float, *, constant: bool = True, blocks: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Least squares y ~ W x + b with penalty lambda ||W||^2; the constant is not penalised.

        Args:
            ridge: lambda in units of the mean diagonal of the (centred) input moments, above 0.
            constant: False fits y ~ W x through the origin and returns b = 0.
            blocks: sizes of groups of inputs, I in all, whose lambda is relative to their own mean
                diagonal: inputs of different scale then shrink alike.

        Returns:
            W (O, I) and b (O), float64.

        Raises:
            ValueError: no tokens were added, or `ridge` is not positive.
        """
        if ridge <= 0:
            raise ValueError(f"ridge {ridge} must be positive")
        xx_II, yx_OI, mean_I, mean_O, _ = self._central(constant)
        scale_I = torch.cat(
            [
                part.mean().expand_as(part)
                for part in xx_II.diagonal().split(list(blocks or [len(xx_II)]))
            ]
        )
        if scale_I.max() <= 0:
            return torch.zeros_like(yx_OI), mean_O
        # Inputs that never vary, a block of them even, get no weight instead of a singular system.
        scale_I = torch.where(scale_I > 0, scale_I, scale_I.max())
        factor = torch.linalg.cholesky(xx_II + ridge * torch.diag(scale_I))
        weight_OI = torch.cholesky_solve(yx_OI.T, factor).T.contiguous()
        return weight_OI, mean_O - weight_OI @ mean_I

    def error(self, weight_OI: Tensor | None = None, bias_O: Tensor | None = None) -> float:
        """Mean over tokens of ||y - W x - b||^2; an omitted term counts as zero.

        Raises:
            ValueError: no tokens were added.
        """
        xx_II, yx_OI, mean_I, mean_O, yy = self._central(True)
        bias = torch.zeros_like(mean_O) if bias_O is None else bias_O.double()
        if weight_OI is None:
            return float(yy + (mean_O - bias).square().sum())
        weight = weight_OI.double()
        spread = yy - 2 * (weight * yx_OI).sum() + ((weight @ xx_II) * weight).sum()
        return float(spread.clamp_min(0) + (mean_O - weight @ mean_I - bias).square().sum())

    def _about(self, shift_I: Tensor, shift_O: Tensor) -> tuple[Tensor, ...]:
        """The five sums with products taken about another shift."""
        n, dx, dy = self.count, self.shift_I - shift_I, self.shift_O - shift_O
        cross = torch.outer(self.sum_I, dx)
        xx = self.xx_II + cross + cross.T + n * torch.outer(dx, dx)
        yx = self.yx_OI + torch.outer(self.sum_O, dx) + torch.outer(dy, self.sum_I + n * dx)
        yy = self.yy + 2 * self.sum_O @ dy + n * dy @ dy
        return self.sum_I + n * dx, self.sum_O + n * dy, xx, yx, yy

    def _central(self, constant: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Moments per token about the mean, or about the origin where no constant is fitted."""
        if self.count == 0:
            raise ValueError("no tokens were added")
        zero_I, zero_O = torch.zeros_like(self.sum_I), torch.zeros_like(self.sum_O)
        mean_I = self.shift_I + self.sum_I / self.count if constant else zero_I
        mean_O = self.shift_O + self.sum_O / self.count if constant else zero_O
        _, _, xx, yx, yy = self._about(mean_I, mean_O)
        return xx / self.count, yx / self.count, mean_I, mean_O, yy / self.count
