"""Scales and zeros that gradients can move: the differentiable form of a nested weight.

Shapes: O output rows, I inputs, G groups; "..." leading dimensions (experts).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fissile.kernels import layout
from fissile.quant.integers import Levels
from fissile.quant.nested import NestedWeight


class SoftFloats:
    """The scales and zeros of all widths of one weight (or stack) in training; codes stay.

    Attributes:
        scale: by width, float32 (..., O, G), change of the scales in units of the starting ones.
        zero: likewise of the zeros of centred codes, in units of the starting scales.

    Args:
        nested: codes, and floats to start from.
    """

    def __init__(self, nested: NestedWeight) -> None:
        self.nested = nested
        ones = dict.fromkeys(nested.widths, 1.0)
        levels = Levels.build(nested.widths, ones, nested.codes.device, nested.companding)
        self._values, self._half = {}, {}
        codes = (nested.codes >> (layout.STORED_BITS - nested.widths[-1])).int()
        for w, width in enumerate(nested.widths):
            self._half[width] = -float(levels.value_WQ[w, 0])
            value = levels.value_WQ[w].index_select(0, codes.flatten()).view_as(codes)
            self._values[width] = value.unflatten(-1, (-1, nested.group_size))
        zeros = {k: torch.zeros_like(nested.scale[k]) for k in nested.widths}
        self.scale = {k: x.clone().requires_grad_() for k, x in zeros.items()}
        self.zero = {k: x.requires_grad_() for k, x in zeros.items()}

    def parameters(self) -> list[Tensor]:
        """All scales and zeros."""
        return [*self.scale.values(), *self.zero.values()]

    def _affine(self, bits: int) -> tuple[Tensor, Tensor]:
        """Current scale and zero of the centred code, (..., O, G)."""
        start = self.nested.scale[bits]
        centred = self.nested.zero[bits] + start * self._half[bits]
        return start * (1 + self.scale[bits]), centred + start * self.zero[bits]

    def dense(self, bits: int) -> Tensor:
        """Weights at one width, float32 (..., O, I), differentiable."""
        scale, zero = self._affine(bits)
        return torch.addcmul(zero[..., None], self._values[bits], scale[..., None]).flatten(-2)

    @torch.no_grad()
    def finish(self) -> NestedWeight:
        """What is stored: floats rounded to float16, scales not negative."""
        scales, zeros = {}, {}
        for width in self.nested.widths:
            scale, zero = self._affine(width)
            scales[width] = scale.clamp(min=0).half().float()
            zeros[width] = (zero - scales[width] * self._half[width]).half().float()
        return replace(self.nested, scale=scales, zero=zeros)
