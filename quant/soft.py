"""Scales and zeros that gradients can move: the differentiable form of a nested weight.

Shapes: O output rows, I inputs, G groups, g inputs a group, Q codes; "..." leading dimensions
(experts).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fissile.kernels import layout
from fissile.quant.integers import Levels
from fissile.quant.nested import NestedWeight


class SoftFloats:
    """The scales and zeros of a weight (or stack) in training; codes stay.

    With a rank R only zeros move, by a product of low rank: such an update merges into the zeros
    that are stored (One QuantLLM for ALL, arXiv 2405.20202, section 3.1).

    Attributes:
        moved: widths that move.
        scale: by moving width k, float32 (..., O, G), change of the scales in units of 2^(2 - k) of
            the starting ones; empty with a rank.
        zero: likewise of the zeros of centred codes, in units of 2^(2 - k) starting scales.
        factors: by moving width, (..., O, R) and (..., R, G) whose product stands for `zero`; empty
            without a rank.

    Args:
        nested: codes, and floats to start from.
        moving: widths whose floats move; all without it.
        rank: R.
        generator: of the second factors; the first are zero.

    Raises:
        ValueError: floats of narrower widths are tied to those of the widest.
    """

    def __init__(
        self,
        nested: NestedWeight,
        moving: Collection[int] | None = None,
        rank: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if nested.tied:
            raise ValueError("tied floats are fitted, not trained")
        self.nested = nested
        widths = tuple(k for k in nested.widths if k <= layout.STORED_BITS)
        ones = dict.fromkeys(widths, 1.0)
        levels = Levels.build(widths, ones, nested.codes.device, nested.companding)
        self._shift = layout.STORED_BITS - widths[-1]
        self._value = dict(zip(widths, levels.value_WQ, strict=True))
        self.moved = [k for k in widths if moving is None or k in moving]
        self.scale: dict[int, nn.Parameter] = {}
        self.zero: dict[int, nn.Parameter] = {}
        self.factors: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        for k in self.moved:
            zeros = torch.zeros_like(nested.scale[k])
            if rank is None:
                self.scale[k], self.zero[k] = nn.Parameter(zeros.clone()), nn.Parameter(zeros)
                continue
            shape = (*zeros.shape[:-2], rank, zeros.shape[-1])
            right = torch.randn(shape, generator=generator) / rank**0.5
            left = zeros.new_zeros((*zeros.shape[:-1], rank))
            self.factors[k] = nn.Parameter(left), nn.Parameter(right)

    def named(self) -> dict[str, nn.Parameter]:
        """Everything that moves, by kind and width."""
        found = {f"scale_{k}": x for k, x in self.scale.items()}
        found |= {f"zero_{k}": x for k, x in self.zero.items()}
        for k, (left, right) in self.factors.items():
            found |= {f"left_{k}": left, f"right_{k}": right}
        return found

    def parameters(self) -> list[nn.Parameter]:
        """Everything that moves."""
        return list(self.named().values())

    def _half(self, bits: int) -> float:
        return -float(self._value[bits][0])

    def _affine(self, bits: int) -> tuple[Tensor, Tensor]:
        """Current scale and zero of the centred code, (..., O, G)."""
        start = self.nested.scale[bits]
        centred = self.nested.zero[bits] + start * self._half(bits)
        # One rate serves all widths: the codes resolve twice as much with every bit.
        unit = start * 2.0 ** (layout.NESTED[0] - bits)
        if bits in self.factors:
            left, right = self.factors[bits]
            return start, centred + unit * (left @ right)
        if bits not in self.scale:
            return start, centred
        return start + unit * self.scale[bits], centred + unit * self.zero[bits]

    def dense(self, bits: int) -> Tensor:
        """Weights at one width, float32 (..., O, I), differentiable."""
        scale, zero = self._affine(bits)
        dense: Tensor = _Decoded.apply(
            scale, zero, self.nested.codes, self._value[bits], self._shift
        )
        return dense

    @torch.no_grad()
    def revert(self, bits: int) -> None:
        """Give one width its starting floats again."""
        if bits in self.factors:
            self.factors[bits][0].zero_()
            return
        self.scale[bits].zero_()
        self.zero[bits].zero_()

    @torch.no_grad()
    def finish(self) -> NestedWeight:
        """What is stored: floats rounded to float16, scales not negative."""
        scales, zeros = dict(self.nested.scale), dict(self.nested.zero)
        for width in self.moved:
            scale, zero = self._affine(width)
            scales[width] = scale.clamp(min=0).half().float()
            zeros[width] = (zero - scales[width] * self._half(width)).half().float()
        return replace(self.nested, scale=scales, zero=zeros)


class _Decoded(torch.autograd.Function):
    """scale * value[code] + zero a group; keeps the codes for the gradient, a byte a weight."""

    @staticmethod
    def forward(
        ctx: Any, scale: Tensor, zero: Tensor, codes: Tensor, value_Q: Tensor, shift: int
    ) -> Tensor:
        ctx.save_for_backward(codes, value_Q)
        ctx.shift, ctx.groups = shift, scale.shape[-1]
        grouped = _values(codes, value_Q, shift).unflatten(-1, (ctx.groups, -1))
        return torch.addcmul(zero[..., None], grouped, scale[..., None]).flatten(-2)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        codes, value_Q = ctx.saved_tensors
        grad = outer[0].unflatten(-1, (ctx.groups, -1))
        value = _values(codes, value_Q, ctx.shift).unflatten(-1, (ctx.groups, -1))
        return torch.linalg.vecdot(grad, value), grad.sum(-1), None, None, None


def _values(codes: Tensor, value_Q: Tensor, shift: int) -> Tensor:
    return value_Q.index_select(0, (codes >> shift).int().flatten()).view_as(codes)
