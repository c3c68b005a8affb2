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

from fissile.kernels.fields import (
    BYTE,
    SLICE,
    Float,
    affine_ptx,
    bend,
    block_codes,
    code_bits,
    fields,
    unpack_ptx,
)

_KINDS: dict[bool, Float] = {False: "bf16", True: "fp16"}
# Of codes, and of companded ones: at 2 bits, and in residuals, a code is its own value.
_FORMS = [(2, 0), *((bits, steep) for bits in (3, 4, 8) for steep in (0, 2, 3))]
_UNPACK = {
    (bits, steep, fp16, half): unpack_ptx(bits, kind, half, steep)
    for bits, steep in _FORMS
    for fp16, kind in _KINDS.items()
    for half in range(2 if bits == 3 else 1)
}
_FIELDS = {
    (bits, steep, fp16): fields(bits, kind, steep)
    for bits, steep in _FORMS
    for fp16, kind in _KINDS.items()
}
_SLICES = {bits: block_codes(bits) // SLICE for bits in (2, 3, 4, 8)}
_BENDS = {bits: bend(bits) for bits in (2, 3, 4, 8)}
_CENTRES = {
    **{(bits, 0): 1 << code_bits(bits) - 1 for bits in (2, 3, 4, 8)},
    # The middle of (v - v0) / 2.
    **{(3, 2): 3, (4, 2): 7, (8, 2): 7, (3, 3): 7, (4, 3): 15, (8, 3): 15},
}
_AFFINE = {
    (bits, steep, fp16, code): affine_ptx(
        kind, f.offset * max(1, steep - 1) + _CENTRES[bits, steep]
    )
    for bits, steep in _FORMS
    for fp16, kind in _KINDS.items()
    for code, f in enumerate(fields(bits, kind, steep))
}
# Triton's cache knows the source of kernels and their constexpr globals, but not these tables.
_DIGEST = tl.constexpr(crc32(repr((_UNPACK, _FIELDS, _SLICES, _BENDS, _CENTRES, _AFFINE)).encode()))
_BF16 = tl.constexpr(tl.bfloat16)
_BF16_4 = tl.constexpr((tl.bfloat16,) * 4)
_BF16_8 = tl.constexpr((tl.bfloat16,) * 8)
_FP16 = tl.constexpr(tl.float16)
_FP16_4 = tl.constexpr((tl.float16,) * 4)
_FP16_8 = tl.constexpr((tl.float16,) * 8)


@constexpr_function
def unpack_text(bits: int, steep: int, fp16: bool, half: int) -> str:
    """PTX of `unpack`."""
    return _UNPACK[bits, steep, fp16, half]


@constexpr_function
def affine_text(bits: int, steep: int, fp16: bool, code: int) -> str:
    """PTX of `weights_of`."""
    return _AFFINE[bits, steep, fp16, code]


@constexpr_function
def piece(
    bits: int, steep: int, fp16: bool, code: int, extra: bool, what: int, half: int = 0
) -> int:
    """Shift (0) and mask (1) of what the word, or the extra word, holds of a code."""
    found = [p for p in _FIELDS[bits, steep, fp16][code].pieces if p.extra == extra]
    return (found[0].shift + extra * BYTE * half, found[0].mask)[what] if found else 0


@constexpr_function
def magic_of(bits: int, steep: int, fp16: bool, code: int) -> int:
    """Exponent bits of a code."""
    return _FIELDS[bits, steep, fp16][code].magic


@constexpr_function
def zero_code(bits: int, steep: int, fp16: bool, code: int) -> int:
    """Offset of a code of a word."""
    return _FIELDS[bits, steep, fp16][code].offset


@constexpr_function
def lift(steep: int) -> int:
    """How often `unpack` of a companded weight adds the offset."""
    return max(1, steep - 1)


@constexpr_function
def bend_of(bits: int, what: int) -> float:
    """Where companded values bend (0, 1), and v0 (2)."""
    return _BENDS[bits][what]


@constexpr_function
def slices(bits: int) -> int:
    """Slices of 32 weights in a block."""
    return _SLICES[bits]


@constexpr_function
def centre_of(bits: int, steep: int) -> int:
    """What is subtracted before the scale, so that the zero left over is small."""
    return _CENTRES[bits, steep]


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
    word: tl.tensor, extra: tl.tensor, BITS: tl.constexpr, STEEP: tl.constexpr,
    HALF: tl.constexpr, FP16: tl.constexpr, code: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What `unpack` makes of one code, in plain operations, for targets without PTX."""
    DTYPE: tl.constexpr = _FP16 if FP16 else _BF16
    mask: tl.constexpr = piece(BITS, STEEP, FP16, code, False, 1)
    rest: tl.constexpr = piece(BITS, STEEP, FP16, code, True, 1)
    magic: tl.constexpr = magic_of(BITS, STEEP, FP16, code)
    if mask == 0:
        bits = (moved(extra, piece(BITS, STEEP, FP16, code, True, 0, HALF)) & rest) | magic
    else:
        bits = (moved(word, piece(BITS, STEEP, FP16, code, False, 0)) & mask) | magic
        if rest > 0:
            bits = (moved(extra, piece(BITS, STEEP, FP16, code, True, 0, HALF)) & rest) | bits
    found = bits.to(DTYPE, bitcast=True)
    if STEEP > 0:
        single = found.to(tl.float32)
        low: tl.constexpr = zero_code(BITS, STEEP, FP16, code) + bend_of(BITS, 0)
        high: tl.constexpr = zero_code(BITS, STEEP, FP16, code) + bend_of(BITS, 1)
        found = (STEEP * single - tl.minimum(tl.maximum(single, low), high)).to(DTYPE)
    return found


@triton.jit
def unpack_plain(
    word: tl.tensor,
    extra: tl.tensor,
    BITS: tl.constexpr,
    STEEP: tl.constexpr,
    HALF: tl.constexpr,
    FP16: tl.constexpr,
) -> tl.tuple:
    """`unpack` without PTX."""
    a = code_at(word, extra, BITS, STEEP, HALF, FP16, 0)
    b = code_at(word, extra, BITS, STEEP, HALF, FP16, 1)
    c = code_at(word, extra, BITS, STEEP, HALF, FP16, 2)
    d = code_at(word, extra, BITS, STEEP, HALF, FP16, 3)
    if BITS < 4:
        e = code_at(word, extra, BITS, STEEP, HALF, FP16, 4)
        f = code_at(word, extra, BITS, STEEP, HALF, FP16, 5)
        g = code_at(word, extra, BITS, STEEP, HALF, FP16, 6)
        h = code_at(word, extra, BITS, STEEP, HALF, FP16, 7)
        return a, b, c, d, e, f, g, h
    else:
        return a, b, c, d


@triton.jit
def unpack(
    word: tl.tensor,
    extra: tl.tensor,
    BITS: tl.constexpr,
    STEEP: tl.constexpr,
    HALF: tl.constexpr,
    FP16: tl.constexpr,
    PTX: tl.constexpr,
) -> tl.tuple:
    """Tiles offset + code of the 8 or 4 codes of every word, in the dtype of the activations.

    Args:
        word: int16 (BN, 32).
        extra: int16 (BN, 32) extra words at 3 bits; else anything.
        STEEP: k of the companding; with it (k - 1) offset + (value - v0) / 2 are made.
        HALF: which of the two tiles of a block, at 3 bits.
    """
    tl.static_assert(_DIGEST >= 0)
    if PTX:
        text: tl.constexpr = unpack_text(BITS, STEEP, FP16, HALF)
        if BITS == 3:
            return tl.inline_asm_elementwise(
                text,
                "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
                [word, extra],
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
        return unpack_plain(word, extra, BITS, STEEP, HALF, FP16)


@triton.jit
def exact(
    value: tl.tensor,
    BITS: tl.constexpr,
    STEEP: tl.constexpr,
    FP16: tl.constexpr,
    code: tl.constexpr,
) -> tl.tensor:
    """The code, or (value - v0) / 2 of a companded one, in float32, from what `unpack` made."""
    return value.to(tl.float32) - lift(STEEP) * zero_code(BITS, STEEP, FP16, code)


@triton.jit
def weights_of(
    value: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    BITS: tl.constexpr,
    STEEP: tl.constexpr,
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
            affine_text(BITS, STEEP, FP16, code),
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
        centred = exact(value, BITS, STEEP, FP16, code) - centre_of(BITS, STEEP)
        weight = centred * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None]
        return weight.to(_FP16 if FP16 else _BF16)


@triton.jit
def scale_zero(theta: tl.tensor, BITS: tl.constexpr, STEEP: tl.constexpr) -> tl.tuple:
    """float32 scale and zero of int32 pairs of float16, for what `exact` gives."""
    scale = (theta & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (theta >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    if STEEP > 0:
        return 2 * scale, zero + bend_of(BITS, 2) * scale
    else:
        return scale, zero


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
