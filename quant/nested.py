"""A bit-nested weight in memory: one integer code, one affine map a width.

Shapes: N output rows, K inputs, G groups along the inputs, S solver steps; "..." leading
dimensions, usually none or the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
        tied: narrower width to float32 (..., N, 3), representable in float16: a, o and e of
            `layout.tied_floats`, which then makes `scale` and `zero` of that width; empty where
            every width has floats of its own.
        companding: which table makes values of codes, see `layout.COMPANDED`.
        residual: uint8 (..., N, K), 4-bit codes of what 4 bits miss; None without widths 6 and 8.
    """

    codes: Tensor
    scale: dict[int, Tensor]
    zero: dict[int, Tensor]
    widths: tuple[int, ...]
    group_size: int
    loss: dict[int, Tensor] = field(default_factory=dict)
    history: Tensor = field(default_factory=lambda: torch.empty(0))
    companding: float = 1.0
    residual: Tensor | None = None
    tied: dict[int, Tensor] = field(default_factory=dict)

    def dequantize(self, bits: int) -> Tensor:
        """Weights at one width, float32 (..., N, K), bit-equal to what an artifact decodes.

        Raises:
            ValueError: `bits` is not one of the widths.
        """
        layout.check_bits(bits, self.widths)
        if bits > layout.STORED_BITS:
            assert self.residual is not None
            part = layout.affine(self.residual >> (8 - bits), self.scale[bits], self.zero[bits])
            return self.dequantize(layout.STORED_BITS).add_(part)
        codes = layout.values(self.codes >> (layout.STORED_BITS - bits), bits, self.companding)
        return layout.affine(codes, self.scale[bits], self.zero[bits])

    def parts(self) -> dict[str, Tensor]:
        """Packed tensors by suffix, in file order; see `fissile.kernels.layout`.

        Raises:
            ValueError: a scale or zero does not fit float16.
        """
        packed = layout.pack(self.codes)
        if self.residual is not None:
            packed |= layout.pack_residual(self.residual)
        for bits in self.widths:
            packed[f"theta_{bits}"] = layout.encode_theta(self.scale[bits], self.zero[bits])
        for bits, coefficients in self.tied.items():
            packed[f"tied_{bits}"] = layout.encode_tied(coefficients)
            own = {k: part for k, part in packed.items() if k != f"theta_{bits}"}
            again = layout.with_own_floats(own, bits)[f"theta_{bits}"]
            assert torch.equal(again, packed[f"theta_{bits}"]), f"{bits} bits: not what is tied"
        return {name: packed[name] for name in layout.stored_names(self.widths, bool(self.tied))}

    @classmethod
    def from_parts(
        cls, parts: Mapping[str, Tensor], group_size: int, companding: float = 1.0
    ) -> NestedWeight:
        """Undo `parts`.

        Raises:
            ValueError: a part is missing.
        """
        kinds = [name.partition("_")[::2] for name in parts]
        tied = {int(k): layout.decode_tied(parts[f"tied_{k}"]) for n, k in kinds if n == "tied"}
        widths = tuple(sorted({int(k) for kind, k in kinds if kind in ("theta", "tied")}))
        thetas = {k: layout.with_own_floats(parts, k)[f"theta_{k}"] for k in widths}
        floats = {k: layout.decode_theta(theta) for k, theta in thetas.items()}
        most = max(k for k in widths if k <= layout.STORED_BITS)
        codes = layout.unpack(parts, most) << (layout.STORED_BITS - most)
        residual = None
        if widths[-1] > layout.STORED_BITS:
            residual = layout.unpack_residual(parts, widths[-1]) << (8 - widths[-1])
        return cls(
            codes,
            {k: scale for k, (scale, _) in floats.items()},
            {k: zero for k, (_, zero) in floats.items()},
            widths,
            group_size,
            companding=companding,
            residual=residual,
            tied=tied,
        )

    def split(self, rows: Sequence[int]) -> list[NestedWeight]:
        """Pieces of so many output rows each, in order."""
        pieces, begin = [], 0
        for count in rows:
            pieces.append(self._each(partial(_rows, part=slice(begin, begin + count))))
            begin += count
        return pieces

    def _each(self, cut: Callable[[Tensor], Tensor]) -> NestedWeight:
        """The same function of codes, scales and zeros; what the solver recorded is dropped."""
        return replace(
            self,
            codes=cut(self.codes),
            scale={k: cut(v) for k, v in self.scale.items()},
            zero={k: cut(v) for k, v in self.zero.items()},
            residual=None if self.residual is None else cut(self.residual),
            tied={k: cut(v) for k, v in self.tied.items()},
            loss={},
            history=torch.empty(0),
        )


def joined(parts: Sequence[NestedWeight], dim: int) -> NestedWeight:
    """One weight of pieces with the same widths and table, along layers (0) or rows (1).

    Args:
        parts: codes (B, O, I).
        dim: 0 or 1.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]

    def of(name: str) -> dict[int, Tensor]:
        return {
            k: torch.cat([getattr(p, name)[k] for p in parts], dim) for k in getattr(first, name)
        }

    residual = None
    if first.residual is not None:
        residual = torch.cat([p.residual for p in parts if p.residual is not None], dim)
    history = [p.history for p in parts if p.history.numel()]
    return replace(
        first,
        codes=torch.cat([p.codes for p in parts], dim),
        scale=of("scale"),
        zero=of("zero"),
        loss=of("loss"),
        tied=of("tied"),
        residual=residual,
        history=torch.cat(history, dim + 1) if history else first.history,
    )


def _rows(x: Tensor, part: slice) -> Tensor:
    return x[..., part, :]
