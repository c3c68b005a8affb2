"""The packed format of bit-nested weights: the one place that knows where every bit lies.

A weight of shape (..., N, K) is stored once, as a 4-bit truncation code whose k most significant
bits are the k-bit code. The bits lie in three planes, and every width has its own affine floats:

    plane_2  uint8 (..., N, K/4)     the two most significant bits, weight 4i+j of byte i at bits 2j
    theta_2  int16 (..., N, G, 2)    bit patterns of fp16 (scale, zero) of the 2-bit weight
    plane_3  uint8 (..., N, K/8)     the third bit, least significant bit first
    theta_3  int16 (..., N, G, 2)
    plane_4  uint8 (..., N, K/8)     the fourth bit
    theta_4  int16 (..., N, G, 2)
    plane_6  uint8 (..., N, K/4)     the two most significant bits of the residual's code
    theta_6  int16 (..., N, G, 2)
    plane_8  uint8 (..., N, K/4)     the other two
    theta_8  int16 (..., N, G, 2)

in this order, so that a k-bit load is a prefix. `W_k = scale_k * value_k + zero_k`, in float32,
where value_k is the code itself or, in a companded weight, its entry in a table of integers. Six
and eight bits add a second code to the four-bit weight: `W_6 = W_4 + scale_6 * r_2 + zero_6`.

Where the floats are tied, the widest width b of 2, 3 and 4 alone has floats of its own for every
group, and each narrower one three coefficients (a, o, e) for every row:

    tied_2   int16 (..., N, 3)       bit patterns of fp16 (a, o, e) of the 2-bit weight

    scale_2 = a scale_b        zero_2 = o scale_b + e zero_b        rounded to fp16

`W_2 = a scale_b value_2 + o scale_b + e zero_b`, that is. The order is then plane_2, theta_b,
tied_2, plane_3, tied_3 and so on: a k-bit load is still a prefix.

The file needs torch and nothing else: it is copied into artifacts beside the modeling code.

Shapes: N output rows, K inputs, G groups along the inputs; "..." any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

LAYOUT_VERSION = 1
NESTED = (2, 3, 4)
WIDTHS = (*NESTED, 6, 8)
STORED_BITS = 4
_PLANE_BITS = {2: 2, 3: 1, 4: 1, 6: 2, 8: 2}
COMPANDED: dict[float, dict[int, tuple[int, ...]]] = {
    1.5: {
        3: (0, 6, 11, 15, 19, 23, 28, 34),
        4: (0, 6, 12, 18, 23, 27, 31, 35, 39, 43, 47, 51, 56, 62, 68, 74),
    },
    2.0: {
        3: (0, 4, 7, 9, 11, 13, 16, 20),
        4: (0, 4, 8, 12, 15, 17, 19, 21, 23, 25, 27, 29, 32, 36, 40, 44),
    },
}
"""Values of the codes of a companded weight, by the width of its two outer 2-bit cells in units of
the inner ones, and by bits. At 2 bits, and with a ratio of 1, a code is its own value."""


def check_shape(inputs: int, group_size: int) -> int:
    """Return the number of groups of `inputs` weights.

    Args:
        inputs: K, length of a row.
        group_size: weights that share a scale and a zero.

    Raises:
        ValueError: K is not a positive multiple of 8 and of `group_size`.
    """
    if inputs <= 0 or inputs % 8:
        raise ValueError(f"K {inputs} is not a positive multiple of 8 (group_size {group_size})")
    if group_size <= 0 or inputs % group_size:
        raise ValueError(f"group_size {group_size} does not divide K {inputs}")
    return inputs // group_size


def check_bits(bits: int, widths: Sequence[int] = WIDTHS) -> None:
    """Raise ValueError unless `bits` is one of `widths`."""
    if bits not in widths:
        raise ValueError(f"bits {bits} is not one of the stored widths {list(widths)}")


def pack(codes: Tensor) -> dict[str, Tensor]:
    """Split 4-bit codes into planes.

    Args:
        codes: uint8 (..., N, K), values 0..15, K a multiple of 8.

    Returns:
        {"plane_2": (..., N, K/4), "plane_3": (..., N, K/8), "plane_4": (..., N, K/8)}, uint8.

    Raises:
        ValueError: wrong dtype, a value above 15, or K not a multiple of 8.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes are {codes.dtype}, accepted: torch.uint8")
    check_shape(codes.shape[-1], codes.shape[-1])
    if codes.numel() and int(codes.max()) >= 1 << STORED_BITS:
        raise ValueError(f"codes hold {int(codes.max())}, accepted: 0 to {(1 << STORED_BITS) - 1}")
    return {
        f"plane_{width}": _pack_bits((codes >> (STORED_BITS - width)) & ((1 << bits) - 1), bits)
        for width, bits in _PLANE_BITS.items()
        if width <= STORED_BITS
    }


def pack_residual(codes: Tensor) -> dict[str, Tensor]:
    """Split the 4-bit codes of a residual, uint8 (..., N, K), into plane_6 and plane_8."""
    return {"plane_6": _pack_bits(codes >> 2, 2), "plane_8": _pack_bits(codes & 3, 2)}


def unpack_residual(planes: Mapping[str, Tensor], bits: int) -> Tensor:
    """Codes of the residual for 6 (two bits of them) or 8 (all four): uint8 (..., N, K)."""
    codes = _unpack_bits(planes["plane_6"], 2)
    return codes if bits == 6 else (codes << 2) | _unpack_bits(planes["plane_8"], 2)


def unpack(planes: Mapping[str, Tensor], bits: int) -> Tensor:
    """Read the codes of one width; planes of higher widths may be absent.

    Args:
        planes: at least plane_2 .. plane_`bits`.
        bits: 2, 3 or 4.

    Returns:
        uint8 (..., N, K), codes 0 .. 2^bits - 1.

    Raises:
        ValueError: `bits` is not 2, 3 or 4, or a plane is missing.
    """
    check_bits(bits, NESTED)
    codes: Tensor | None = None
    for width, plane_bits in _PLANE_BITS.items():
        if width > bits:
            break
        if f"plane_{width}" not in planes:
            raise ValueError(f"plane_{width} is missing, needed for {bits} bits")
        part = _unpack_bits(planes[f"plane_{width}"], plane_bits)
        codes = part if codes is None else codes.bitwise_left_shift_(plane_bits).bitwise_or_(part)
    assert codes is not None
    return codes


def encode_theta(scale: Tensor, zero: Tensor) -> Tensor:
    """Store scale and zero as the bit patterns of float16.

    int16 rather than float16, so that no loader casts them to the dtype of the model.

    Args:
        scale: float (..., N, G).
        zero: float (..., N, G).

    Returns:
        int16 (..., N, G, 2).

    Raises:
        ValueError: a value is NaN, or outside the range of float16 (largest 65504).
    """
    return _half_bits(torch.stack([scale, zero], dim=-1), "scale or zero")


def decode_theta(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_theta`: int16 (..., N, G, 2) to float32 scale and zero (..., N, G)."""
    values = theta.view(torch.float16).float()
    return values[..., 0], values[..., 1]


def encode_tied(coefficients: Tensor) -> Tensor:
    """Store (a, o, e) of every row as the bit patterns of float16: int16 (..., N, 3).

    Args:
        coefficients: float (..., N, 3).

    Raises:
        ValueError: a value is NaN, or outside the range of float16 (largest 65504).
    """
    return _half_bits(coefficients, "coefficient")


def decode_tied(tied: Tensor) -> Tensor:
    """Inverse of `encode_tied`: int16 (..., N, 3) to float32 (..., N, 3)."""
    return tied.view(torch.float16).float()


def tied_floats(coefficients: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of a narrower width from those of the widest, rounded to float16.

    A product of two float16 values is exact in float32, so that the sum is rounded once however a
    device or a compiler computes it: the result has the same bits everywhere.

    Args:
        coefficients: float32 (..., N, 3): a, o, e; representable in float16, like the others.
        scale: float32 (..., N, G), of the widest of 2, 3 and 4 bits.
        zero: float32 (..., N, G).

    Returns:
        float32 scale and zero (..., N, G); infinite where float16 overflows.
    """
    a, o, e = (part.unsqueeze(-1) for part in coefficients.unbind(-1))
    return (a * scale).half().float(), (o * scale + e * zero).half().float()


def with_own_floats(parts: Mapping[str, Tensor], bits: int) -> Mapping[str, Tensor]:
    """The parts of one width with theta_`bits` among them, whether it is stored or tied.

    Every reader of floats starts here, so that it need not know of tied ones.

    Args:
        parts: what `segment_names` lists for `bits`; more does no harm.
        bits: one of `WIDTHS`.

    Raises:
        ValueError: neither is there.
    """
    if f"theta_{bits}" in parts:
        return parts
    base = [f"theta_{width}" for width in NESTED if f"theta_{width}" in parts]
    if f"tied_{bits}" not in parts or not base:
        raise ValueError(f"theta_{bits} is missing, needed for {bits} bits")
    coefficients = decode_tied(parts[f"tied_{bits}"])
    floats = tied_floats(coefficients, *decode_theta(parts[base[-1]]))
    # Not `encode_theta`: looking at the values would hold up a GPU and a compiler.
    theta = torch.stack(floats, dim=-1).half().view(torch.int16)
    return {**parts, f"theta_{bits}": theta}


def _half_bits(values: Tensor, what: str) -> Tensor:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        worst = values.abs().max().item()
        raise ValueError(f"{what} {worst:g} does not fit float16, accepted: up to 65504")
    return half.view(torch.int16)


def affine(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return scale * value + zero in float32; every decoder rounds as this function does.

    Args:
        codes: uint8 (..., N, K), `values` of one width.
        scale: float32 (..., N, G).
        zero: float32 (..., N, G).
    """
    grouped = codes.unflatten(-1, (scale.shape[-1], -1)).float()
    return grouped.mul_(scale.unsqueeze(-1)).add_(zero.unsqueeze(-1)).flatten(-2)


def values(codes: Tensor, bits: int, companding: float = 1.0) -> Tensor:
    """Integer values of the codes of one width, uint8; the codes themselves without companding.

    Raises:
        ValueError: `companding` is neither 1 nor a key of `COMPANDED`.
    """
    if companding == 1 or bits == 2:
        return codes
    if companding not in COMPANDED:
        raise ValueError(f"companding {companding}, accepted: 1 or one of {list(COMPANDED)}")
    table = torch.tensor(COMPANDED[companding][bits], dtype=torch.uint8, device=codes.device)
    return table[codes.int()]


def dequantize(parts: Mapping[str, Tensor], bits: int, companding: float = 1.0) -> Tensor:
    """Weights at one width: float32 (..., N, K).

    Args:
        parts: what `segment_names` lists for `bits`.
        bits: one of `WIDTHS`.
        companding: of this weight, see `COMPANDED`.

    Raises:
        ValueError: a part is missing, or `bits` is not stored.
    """
    check_bits(bits)
    theta = decode_theta(with_own_floats(parts, bits)[f"theta_{bits}"])
    if bits > STORED_BITS:
        base = dequantize(parts, STORED_BITS, companding)
        return base.add_(affine(unpack_residual(parts, bits), *theta))
    return affine(values(unpack(parts, bits), bits, companding), *theta)


def experts_by_width(bits_E: Sequence[int]) -> dict[int, list[int]]:
    """Width to the experts that have it, both in ascending order."""
    widths = sorted(set(bits_E))
    return {bits: [e for e, own in enumerate(bits_E) if own == bits] for bits in widths}


def tied_base(widths: Sequence[int]) -> int:
    """The widest of 2, 3 and 4 among `widths`: where floats are tied, it keeps those of groups."""
    return max(width for width in widths if width <= STORED_BITS)


def segment_names(bits: int, widths: Sequence[int] = WIDTHS, tied: bool = False) -> tuple[str, ...]:
    """Suffixes of the tensors that a `bits`-wide load needs, in file order.

    Planes are cumulative, floats are not: 3 bits need ("plane_2", "plane_3", "theta_3"), or, where
    they are tied to those of 4, ("plane_2", "theta_4", "plane_3", "tied_3").

    Raises:
        ValueError: `bits` is not one of `widths`.
    """
    check_bits(bits, widths)
    base = tied_base(widths) if tied else bits
    if bits > STORED_BITS:
        residual = (f"plane_{width}" for width in (6, 8) if width <= bits)
        return (*segment_names(STORED_BITS, widths, tied), *residual, f"theta_{bits}")
    planes = [f"plane_{width}" for width in _PLANE_BITS if width <= bits]
    if not tied:
        return (*planes, f"theta_{bits}")
    own = () if bits == base else (f"tied_{bits}",)
    return (planes[0], f"theta_{base}", *planes[1:], *own)


def stored_names(widths: Sequence[int] = NESTED, tied: bool = False) -> tuple[str, ...]:
    """Suffixes of all tensors of a weight that serves `widths`, in file order."""
    names: list[str] = []
    base = tied_base(widths) if tied else None
    for width in WIDTHS:
        if width <= max(widths):
            names.append(f"plane_{width}")
        if base is not None and width == NESTED[0]:
            names.append(f"theta_{base}")
        if width in widths and width != base:
            names.append(f"{'tied' if base is not None and width < base else 'theta'}_{width}")
    return tuple(names)


def stack_names(
    bits_E: Sequence[int], widths: Sequence[int] = WIDTHS, tied: bool = False
) -> tuple[str, ...]:
    """Suffixes of the tensors that experts of these widths need, in file order."""
    needed = {name for bits in set(bits_E) for name in segment_names(bits, widths, tied)}
    return tuple(name for name in stored_names(widths, tied) if name in needed)


def part_shape(name: str, shape: Sequence[int], group_size: int) -> tuple[int, ...]:
    """Shape of the part `name` ("plane_3", "theta_2" …) of a weight of shape (..., N, K)."""
    kind, _, width = name.partition("_")
    groups = check_shape(shape[-1], group_size)
    if kind == "theta":
        return (*shape[:-1], groups, 2)
    if kind == "tied":
        return (*shape[:-1], 3)
    return (*shape[:-1], shape[-1] * _PLANE_BITS[int(width)] // 8)


def part_dtype(name: str) -> torch.dtype:
    """uint8 for planes, int16 for floats."""
    return torch.uint8 if name.startswith("plane") else torch.int16


def loaded_bytes(
    shape: Sequence[int],
    group_size: int,
    bits: int,
    widths: Sequence[int] = WIDTHS,
    tied: bool = False,
) -> int:
    """Bytes that a `bits`-wide load of a weight of shape (..., N, K) holds, floats included.

    Args:
        shape: of the weight.
        group_size: inputs that share a scale and a zero.
        bits: the width.
        widths: that are stored; what a load holds depends on them where floats are tied.
        tied: whether they are.
    """
    return _bytes(segment_names(bits, widths, tied), shape, group_size)


def stored_bytes(
    shape: Sequence[int], group_size: int, widths: Sequence[int] = NESTED, tied: bool = False
) -> int:
    """Bytes of a weight of shape (..., N, K) in the file, all planes and floats of `widths`."""
    return _bytes(stored_names(widths, tied), shape, group_size)


def bits_per_weight(shape: Sequence[int], group_size: int, bits: int) -> float:
    """Bits that one weight costs in memory when loaded at `bits`, floats included."""
    return 8 * loaded_bytes(shape, group_size, bits) / prod(shape)


def _bytes(names: Sequence[str], shape: Sequence[int], group_size: int) -> int:
    return sum(prod(part_shape(n, shape, group_size)) * part_dtype(n).itemsize for n in names)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)


def _pack_bits(values: Tensor, bits: int) -> Tensor:
    lanes = values.unflatten(-1, (-1, 8 // bits)) << _shifts(bits, values.device)
    return lanes.sum(dim=-1, dtype=torch.uint8)  # the lanes do not overlap, so sum is bitwise or


def _unpack_bits(plane: Tensor, bits: int) -> Tensor:
    lanes = (plane.unsqueeze(-1) >> _shifts(bits, plane.device)) & ((1 << bits) - 1)
    return lanes.flatten(-2)
