"""Where the codes of a word lie, and how two of them become floats with one logic operation.

A code q of b bits, moved to bit `position` of a 16-bit lane and joined with the exponent bits
`magic`, is the float `offset + q` exactly: the exponent is chosen so that the mantissa counts in
steps of one at that position. The offset is not subtracted a weight; it is folded into the
correction of the group (`fissile.kernels.triton_decode`).

At 3 bits eight codes take a word and half of an extra word, which serves two words (its "halves"):
five codes and the top bit of the last in the word, two codes and the rest of the last in the byte.
Eight bits are two 4-bit codes with floats of their own.

The values of a companded weight (`fissile.kernels.layout.COMPANDED`) are a line with a bend at each
end, v = 2 (k q - clamp(q)) + v0, so no table is looked up: from `offset + q` a minimum, a maximum
and a fused multiply-add make `(k - 1) offset + (v - v0) / 2`, which the formats hold exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp
from typing import Literal

Float = Literal["bf16", "fp16"]
WORD_BITS = 16
BYTE = 8  # bits of an extra word that one word has
SLICE = 32  # words of a row in a tile, so weights of one code position
_MANTISSA: dict[Float, int] = {"bf16": 7, "fp16": 10}
_BIAS: dict[Float, int] = {"bf16": 127, "fp16": 15}
# Where each code comes to lie in the mantissa. Codes that need the same shift share it, and
# positions high in the mantissa give small offsets, hence little cancellation.
STEEP = {1.0: 0, 1.5: 3, 2.0: 2}
"""k of a companding; 0 where a code is its own value."""
_POSITIONS: dict[tuple[int, Float], tuple[int, ...]] = {
    (2, "bf16"): (0, 2, 4, 0, 2, 4, 2, 4),
    (2, "fp16"): (6, 8, 4, 6, 8, 4, 6, 8),
    (3, "bf16"): (0, 3, 1, 4, 3, 0, 3, 4),
    (3, "fp16"): (4, 7, 4, 7, 4, 4, 7, 5),
    (4, "bf16"): (3, 3, 3, 3),
    (4, "fp16"): (2, 6, 2, 6),
}
# Halves of a code and k times it must be exact too, so offsets are 32 at most.
_STEEP_POSITIONS: dict[tuple[int, Float], tuple[int, ...]] = {(3, "bf16"): (2, 3, 3, 3, 3, 2, 3, 4)}


@dataclass(frozen=True)
class Piece:
    """Bits of a code that lie together.

    Attributes:
        extra: whether in the extra word, in the byte of the first half, else in the word.
        shift: right shift that brings them to their place in the mantissa; negative is left.
        mask: them after the shift.
    """

    extra: bool
    shift: int
    mask: int


@dataclass(frozen=True)
class Field:
    """One code of a word.

    Attributes:
        pieces: of the code, one or two.
        magic: exponent bits; all pieces joined with them are `offset + code` as a float.
        offset: value of the code 0, a power of two.
    """

    pieces: tuple[Piece, ...]
    magic: int
    offset: int


def code_bits(bits: int) -> int:
    """Bits of the codes that are unpacked at a width: itself, 4 for the two codes of 8 bits."""
    return 4 if bits == 8 else bits


def codes_per_word(bits: int) -> int:
    """Codes of one word of the main plane: 8 at 2 and 3 bits, 4 at 4 and 8."""
    return 8 if bits in (2, 3) else 4


def halves(bits: int) -> int:
    """Main words that one extra word serves: 2 at 3 bits, else 1."""
    return 2 if bits == 3 else 1


def block_codes(bits: int) -> int:
    """Weights of a row in one block of tiles: 256 at 2 bits, 512 at 3, 128 at 4 and 8."""
    return SLICE * codes_per_word(bits) * halves(bits)


def places(bits: int) -> tuple[tuple[tuple[bool, int, int, int], ...], ...]:
    """Where the bits of each code of a word lie.

    Returns:
        Of each code its pieces: whether in the extra word, the first bit there (of the first half),
        how many bits, and the bit of the code that the first one is.
    """
    if bits != 3:
        wide, step = code_bits(bits), WORD_BITS // codes_per_word(bits)
        return tuple(((False, step * e, wide, 0),) for e in range(codes_per_word(bits)))
    whole = [((False, 3 * e, 3, 0),) for e in range(5)]
    byte = [((True, 3 * e, 3, 0),) for e in range(2)]
    return (*whole, *byte, ((False, 15, 1, 2), (True, 6, 2, 0)))


def bend(bits: int) -> tuple[float, float, int]:
    """Where the values of a companded code bend, and v0: clamp(q) is to between the first two."""
    quarter = 1 << code_bits(bits) - 2
    return quarter - 0.5, 3 * quarter - 0.5, 2 * quarter - 1


def fields(bits: int, kind: Float, steep: int = 0) -> tuple[Field, ...]:
    """Fields of one word.

    Args:
        bits: 2, 3, 4 or 8; the two words of 8 bits have the fields of 4 bits.
        kind: float that the codes become.
        steep: of the weight's companding, see `STEEP`.
    """
    wide, mantissa = code_bits(bits), _MANTISSA[kind]
    positions, out = _POSITIONS[wide, kind], []
    if steep:
        positions = _STEEP_POSITIONS.get((wide, kind), positions)
    for position, pieces in zip(positions, places(bits), strict=True):
        assert 0 <= position <= mantissa - wide
        exponent = mantissa - position
        found = (
            Piece(extra, bit - position - low, ((1 << size) - 1) << (position + low))
            for extra, bit, size, low in pieces
        )
        out.append(Field(tuple(found), (_BIAS[kind] + exponent) << mantissa, 1 << exponent))
    return tuple(out)


def unpack_ptx(bits: int, kind: Float, half: int = 0, steep: int = 0) -> str:
    """PTX that turns a pair of 16-bit words into pairs of floats, two lanes a register.

    Operands: one output a code, then the word; at 3 bits also the extra word.

    Args:
        bits: 2, 3, 4 or 8.
        kind: "bf16" or "fp16".
        half: at 3 bits, which byte of the extra word.
        steep: of the weight's companding.
    """
    table = fields(bits, kind, steep)
    lines: list[str] = []
    shifted: dict[tuple[bool, int], str] = {}
    for code, field in enumerate(table):
        # With a sign, so that one multiply-add subtracts.
        rest = _twice(field.magic | (0x8000 if steep else 0))
        for piece in field.pieces:
            shift = piece.shift + piece.extra * BYTE * half
            source = piece.extra, shift
            if source not in shifted:
                name = f"t{len(shifted)}"
                shifted[source] = _shift(lines, name, f"${len(table) + piece.extra}", shift)
            # (source & mask) | rest
            lines.append(
                f"lop3.b32 ${code}, {shifted[source]}, {_twice(piece.mask)}, {rest}, 0xea;"
            )
            rest = f"${code}"
        if steep:
            lines += _bent_ptx(f"${code}", bits, kind, field.offset, steep)
    registers = ", ".join(["v", "c", *(f"t{i}" for i in range(len(shifted)))])
    return f"{{ .reg .b32 {registers};\n" + "\n".join(lines) + " }"


def _bent_ptx(code: str, bits: int, kind: Float, offset: int, steep: int) -> list[str]:
    """Turn -(offset + q) into k (offset + q) - clamp(offset + q)."""
    low, high, _ = bend(bits)
    form = "bf16x2" if kind == "bf16" else "f16x2"
    steps = []
    for name, bound in (("min", low), ("max", high)):
        steps.append(f"mov.b32 c, {_twice(_pattern(-offset - bound, kind))};")
        steps.append(f"{name}.{form} v, {code if name == 'min' else 'v'}, c;")
    steps.append(f"mov.b32 c, {_twice(_pattern(-steep, kind))};")
    return [*steps, f"fma.rn.{form} {code}, {code}, c, v;"]


def _pattern(value: float, kind: Float) -> int:
    """Bits of a normal number that the format holds exactly."""
    mantissa = _MANTISSA[kind]
    fraction, exponent = frexp(abs(value))
    digits = fraction * (2 << mantissa)
    assert digits == int(digits)
    sign = 0x8000 if value < 0 else 0
    return sign | (_BIAS[kind] + exponent - 1) << mantissa | int(digits) & ((1 << mantissa) - 1)


def affine_ptx(kind: Float, minus: int) -> str:
    """PTX of `(v - minus) * scale + zero`, the difference exact, two lanes a register.

    Operands: output, v, scale, zero.

    Args:
        kind: "bf16" or "fp16".
        minus: positive integer that the float represents exactly.
    """
    one, constant = _pattern(1, kind), _pattern(-minus, kind)
    fma = "fma.rn.bf16x2" if kind == "bf16" else "fma.rn.f16x2"
    return (
        "{ .reg .b32 o, c;\n"
        f"mov.b32 o, {_twice(one)};\nmov.b32 c, {_twice(constant)};\n"
        f"{fma} $0, $1, o, c;\n{fma} $0, $0, $2, $3; }}"
    )


def _twice(lane: int) -> str:
    return f"0x{lane:04x}{lane:04x}"


def _shift(lines: list[str], register: str, word: str, shift: int) -> str:
    """Append the shift of `word`, if any, and return the register that holds the result."""
    if shift == 0:
        return word
    lines.append(f"{'shr' if shift > 0 else 'shl'}.b32 {register}, {word}, {abs(shift)};")
    return register
