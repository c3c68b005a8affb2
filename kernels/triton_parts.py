"""Pieces of the Triton kernels: codes to floats, activations, floats of a group.

Importing this module imports Triton; only launchers do, inside functions. Kernels keep to what
Triton 3.6 and 3.9 share.

Shapes: BN rows of a tile, BM tokens of a tile, 32 words a row.
"""

from __future__ import annotations

from zlib import crc32

import triton
import triton.language as tl
from triton import constexpr_function

from fissile.kernels.fields import Float, affine_ptx, fields, slice_offsets, unpack_ptx

_KINDS: dict[bool, Float] = {False: "bf16", True: "fp16"}
_UNPACK = {
    (bits, fp16, half): unpack_ptx(bits, kind, half)
    for bits in (2, 3, 4, 8)
    for fp16, kind in _KINDS.items()
    for half in range(2 if bits == 3 else 1)
}
_FIELDS = {
    (bits, fp16): tuple((f.shift, f.mask, f.magic, f.offset) for f in fields(bits, kind))
    for bits in (2, 3, 4, 8)
    for fp16, kind in _KINDS.items()
}
_AFFINE = {
    (bits, fp16, code): affine_ptx(kind, f.offset + centre)
    for bits, centre in ((2, 2), (3, 4), (4, 8), (8, 8))
    for fp16, kind in _KINDS.items()
    for code, f in enumerate(fields(bits, kind))
}
_OFFSETS = {
    (bits, fp16): slice_offsets(bits, kind)
    for bits in (2, 3, 4, 8)
    for fp16, kind in _KINDS.items()
}
# Triton's cache knows the source of kernels and their constexpr globals, but not these tables.
_DIGEST = tl.constexpr(crc32(repr((_UNPACK, _FIELDS, _AFFINE, _OFFSETS)).encode()))
_BF16 = tl.constexpr(tl.bfloat16)
_BF16_4 = tl.constexpr((tl.bfloat16,) * 4)
_BF16_8 = tl.constexpr((tl.bfloat16,) * 8)
_FP16 = tl.constexpr(tl.float16)
_FP16_4 = tl.constexpr((tl.float16,) * 4)
_FP16_8 = tl.constexpr((tl.float16,) * 8)


@constexpr_function
def unpack_text(bits: int, fp16: bool, half: int) -> str:
    """PTX of `unpack`."""
    return _UNPACK[bits, fp16, half]


@constexpr_function
def affine_text(bits: int, fp16: bool, code: int) -> str:
    """PTX of `weights_of`."""
    return _AFFINE[bits, fp16, code]


@constexpr_function
def field(bits: int, fp16: bool, code: int, what: int) -> int:
    """Shift (0), mask (1), magic (2) or offset (3) of a code of a word."""
    return _FIELDS[bits, fp16][code][what]


@constexpr_function
def offset_of(bits: int, fp16: bool, index: int) -> int:
    """Offset of one slice of a block."""
    return _OFFSETS[bits, fp16][index]


@constexpr_function
def slices(bits: int) -> int:
    """Slices of 32 weights in a block."""
    return len(_OFFSETS[bits, False])


@constexpr_function
def centre_of(bits: int) -> int:
    """Code that is subtracted before the scale, so that the zero left over is small."""
    return {2: 2, 3: 4, 4: 8, 8: 8}[bits]


@triton.jit
def moved(word: tl.tensor, shift: tl.constexpr) -> tl.tensor:
    """Shift right, or left where `shift` is negative."""
    if shift > 0:
        return word >> shift
    elif shift < 0:
        return word << -shift
    else:
        return word


@triton.jit
def code_at(
    word: tl.tensor,
    third: tl.tensor,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    FP16: tl.constexpr,
    code: tl.constexpr,
) -> tl.tensor:
    """offset + code in plain operations, for targets without PTX."""
    shift: tl.constexpr = field(BITS, FP16, code, 0)
    mask: tl.constexpr = field(BITS, FP16, code, 1)
    magic: tl.constexpr = field(BITS, FP16, code, 2)
    if BITS == 3:
        low: tl.constexpr = mask & -mask
        high: tl.constexpr = mask - low
        bits = (moved(word, shift - 1) & high) | (moved(third, shift + HALF) & low) | magic
    else:
        bits = (moved(word, shift) & mask) | magic
    if FP16:
        return bits.to(_FP16, bitcast=True)
    else:
        return bits.to(_BF16, bitcast=True)


@triton.jit
def unpack(
    word: tl.tensor,
    third: tl.tensor,
    BITS: tl.constexpr,
    HALF: tl.constexpr,
    FP16: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tuple:
    """Tiles offset + code of the 8 or 4 codes of every word, in the dtype of the activations.

    Args:
        word: int16 (BN, 32).
        third: int16 (BN, 32) third bits at 3 bits; else anything.
        HALF: which of the two tiles of a block, at 3 bits.
    """
    tl.static_assert(_DIGEST >= 0)
    if PTX:
        text: tl.constexpr = unpack_text(BITS, FP16, HALF)
        if BITS == 3:
            return tl.inline_asm_elementwise(
                text,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
                [word, third],
                dtype=_FP16_8 if FP16 else _BF16_8,
                is_pure=True,
                pack=2,
            )
        elif BITS == 2:
            return tl.inline_asm_elementwise(
                text,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
                [word],
                dtype=_FP16_8 if FP16 else _BF16_8,
                is_pure=True,
                pack=2,
            )
        else:
            return tl.inline_asm_elementwise(
                text,
                "=&r,=&r,=&r,=&r,r",
                [word],
                dtype=_FP16_4 if FP16 else _BF16_4,
                is_pure=True,
                pack=2,
            )
    else:
        a = code_at(word, third, BITS, HALF, FP16, 0)
        b = code_at(word, third, BITS, HALF, FP16, 1)
        c = code_at(word, third, BITS, HALF, FP16, 2)
        d = code_at(word, third, BITS, HALF, FP16, 3)
        if BITS < 4:
            e = code_at(word, third, BITS, HALF, FP16, 4)
            f = code_at(word, third, BITS, HALF, FP16, 5)
            g = code_at(word, third, BITS, HALF, FP16, 6)
            h = code_at(word, third, BITS, HALF, FP16, 7)
            return a, b, c, d, e, f, g, h
        else:
            return a, b, c, d


@triton.jit
def exact(
    value: tl.tensor, BITS: tl.constexpr, FP16: tl.constexpr, code: tl.constexpr
) -> tl.tensor:
    """The code itself in float32, given what `unpack` made of it."""
    return value.to(tl.float32) - field(BITS, FP16, code, 3)


@triton.jit
def weights_of(
    value: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    BITS: tl.constexpr,
    FP16: tl.constexpr,
    code: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tensor:
    """(value - offset - centre) * scale + zero in the dtype of the activations, (BN, 32).

    Args:
        value: what `unpack` gave for `code`.
        scale: (BN,) in that dtype.
        zero: (BN,) in that dtype, the zero with centre * scale added.
    """
    if PTX:
        return tl.inline_asm_elementwise(
            affine_text(BITS, FP16, code),
            "=&r,r,r,r",
            [
                value,
                tl.broadcast_to(scale[:, None], value.shape),
                tl.broadcast_to(zero[:, None], value.shape),
            ],
            dtype=value.dtype,
            is_pure=True,
            pack=2,
        )
    else:
        centred = exact(value, BITS, FP16, code) - centre_of(BITS)
        weight = centred * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None]
        return weight.to(_FP16 if FP16 else _BF16)


@triton.jit
def scale_zero(theta: tl.tensor) -> tl.tuple:
    """float32 scale and zero of int32 pairs of float16."""
    scale = (theta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    zero = (theta >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def activated(gate: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """SiLU (0), GELU by the error function (1) or by tanh (2), float32."""
    if ACT == 0:
        return gate / (1.0 + tl.exp(-gate))
    elif ACT == 1:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def gate_and_up(both: tl.tensor, BN: tl.constexpr, BM: tl.constexpr) -> tl.tuple:
    """Split (BN, BM) rows, interleaved by eight, into gate and up of BN/2 neurons."""
    apart = tl.permute(tl.reshape(both, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
    gate, up = tl.split(apart)
    return tl.reshape(gate, (BN // 2, BM)), tl.reshape(up, (BN // 2, BM))


@triton.jit
def slice_offset(index: tl.tensor, BITS: tl.constexpr, FP16: tl.constexpr) -> tl.tensor:
    """Offset of slices of 32 inputs, float32, by their index along the inputs."""
    tl.static_assert(_DIGEST >= 0)
    place = index % slices(BITS)
    found = tl.zeros(index.shape, tl.float32)
    for i in tl.static_range(slices(BITS)):
        found = tl.where(place == i, offset_of(BITS, FP16, i), found)
    return found
