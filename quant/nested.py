"""A bit-nested weight in memory: one integer code, one affine map a width.

Shapes: N output rows, K inputs, G groups along the inputs, S solver steps; "..." leading
dimensions, usually none or the experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fissile.kernels import layout


@dataclass(frozen=True, eq=False)
class NestedWeight:
    """Integer codes and floats of all widths of one weight (or of a batch of equal shape).

    Attributes:
        codes: uint8 (..., N, K), 4-bit truncation codes; the k-bit code is `codes >> (4 - k)`.
        scale: width to float32 (..., N, G), exactly representable in float16.
        zero: width to float32 (..., N, G), added to scale * code; representable in float16.
        widths: ascending widths that can be served.
        group_size: inputs that share a scale and a zero.
        loss: width to float32 (..., N), (W_k - W) H (W_k - W)^T a row, H as it was given.
        history: float64 (S, ..., N), the objective a row after every step of the solver (weighted
            over the widths, H normalised and damped); empty for the baselines.
    """

    codes: Tensor
    scale: dict[int, Tensor]
    zero: dict[int, Tensor]
    widths: tuple[int, ...]
    group_size: int
    loss: dict[int, Tensor] = field(default_factory=dict)
    history: Tensor = field(default_factory=lambda: torch.empty(0))

    def dequantize(self, bits: int) -> Tensor:
        """Weights at one width, float32 (..., N, K), bit-equal to what an artifact decodes.

        Raises:
            ValueError: `bits` is not one of the widths.
        """
        layout.check_bits(bits, self.widths)
        codes = self.codes >> (layout.STORED_BITS - bits)
        return layout.affine(codes, self.scale[bits], self.zero[bits])

    def parts(self) -> dict[str, Tensor]:
        """Packed tensors by suffix, in file order; see `fissile.kernels.layout`.

        Raises:
            ValueError: a scale or zero does not fit float16.
        """
        packed = layout.pack(self.codes)
        for bits in self.widths:
            packed[f"theta_{bits}"] = layout.encode_theta(self.scale[bits], self.zero[bits])
        return {name: packed[name] for name in layout.stored_names(self.widths)}
