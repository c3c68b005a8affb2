"""Where the codes of a word lie, and how two of them become floats with one logic operation.

A code q of b bits, moved to bit `position` of a 16-bit lane and joined with the exponent bits
`magic`, is the float `offset + q` exactly: the exponent is chosen so that the mantissa counts in
steps of one at that position. The offset is not subtracted a weight; it is folded into the
correction of the group (`fissile.kernels.launch.group_sums`).

At 3 bits the upper two bits come from the main word and the lowest from a word of third bits, which
serves two main words (its "halves"). Eight bits are two 4-bit codes with floats of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Float = Literal["bf16", "fp16"]
WORD_BITS = 16
SLICE = 32  # words of a row in a tile, so weights of one code position
_MANTISSA: dict[Float, int] = {"bf16": 7, "fp16": 10}
_BIAS: dict[Float, int] = {"bf16": 127, "fp16": 15}
# Right shift (negative: left) of each code of a word. Few distinct shifts cost few instructions;
# positions high in the mantissa give small offsets, hence little cancellation.
_SHIFTS: dict[tuple[int, Float], tuple[int, ...]] = {
    (2, "bf16"): (0, 0, 0, 6, 6, 6, 10, 10),
    (2, "fp16"): (-6, -6, 0, 0, 0, 6, 6, 6),
    (3, "bf16"): (0, 0, 0, 6, 6, 6, 10, 10),
    (3, "fp16"): (-2, -2, -2, 4, 4, 4, 8, 8),
    (4, "bf16"): (-3, 1, 5, 9),
    (4, "fp16"): (-2, -2, 6, 6),
}


@dataclass(frozen=True)
class Field:
    """One code of a word.

    Attributes:
        shift: right shift of the word that brings the code to its position; negative is left. At 3
            bits the word is `main << 1 | third`, which is never built.
        mask: bits of the code after the shift.
        magic: exponent bits; `(word >> shift) & mask | magic` is `offset + code` as a float.
        offset: value of the code 0, a power of two.
    """

    shift: int
    mask: int
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


def fields(bits: int, kind: Float) -> tuple[Field, ...]:
    """Fields of one word.

    Args:
        bits: 2, 3, 4 or 8; the two words of 8 bits have the fields of 4 bits.
        kind: float that the codes become.
    """
    wide, mantissa = code_bits(bits), _MANTISSA[kind]
    step = WORD_BITS // codes_per_word(bits)
    out = []
    for code, shift in enumerate(_SHIFTS[wide, kind]):
        position = code * step - shift
        assert 0 <= position <= mantissa - wide
        exponent = mantissa - position
        mask = ((1 << wide) - 1) << position
        out.append(Field(shift, mask, (_BIAS[kind] + exponent) << mantissa, 1 << exponent))
    return tuple(out)


def slice_offsets(bits: int, kind: Float) -> tuple[int, ...]:
    """Offset of each slice of 32 weights of a block, in order."""
    return tuple(field.offset for field in fields(bits, kind)) * halves(bits)


def unpack_ptx(bits: int, kind: Float, half: int = 0) -> str:
    """PTX that turns a pair of 16-bit words into pairs of floats, two lanes a register.

    Operands: one output a code, then the word; at 3 bits also the word of third bits.

    Args:
        bits: 2, 3, 4 or 8.
        kind: "bf16" or "fp16".
        half: at 3 bits, which bits of the third bits: 0 the even ones, 1 the odd ones.
    """
    table = fields(bits, kind)
    lines, loaded, main, third = [".reg .b32 t, u;"], None, "", ""
    for code, field in enumerate(table):
        out, rest = f"${code}", _twice(field.magic)
        if field.shift != loaded:
            loaded = field.shift
            main = _shift(lines, "t", f"${len(table)}", loaded - (bits == 3))
            if bits == 3:
                third = _shift(lines, "u", f"${len(table) + 1}", loaded + half)
        low = field.mask & -field.mask if bits == 3 else 0
        lines.append(f"lop3.b32 {out}, {main}, {_twice(field.mask ^ low)}, {rest}, 0xea;")
        if bits == 3:
            lines.append(f"lop3.b32 {out}, {third}, {_twice(low)}, {out}, 0xea;")
    return "{ " + "\n".join(lines) + " }"


def affine_ptx(kind: Float, minus: int) -> str:
    """PTX of `(v - minus) * scale + zero`, the difference exact, two lanes a register.

    Operands: output, v, scale, zero.

    Args:
        kind: "bf16" or "fp16".
        minus: positive integer that the float represents exactly.
    """
    mantissa = _MANTISSA[kind]
    exponent = minus.bit_length() - 1
    digits = (minus << mantissa >> exponent) & ((1 << mantissa) - 1)
    assert (digits | 1 << mantissa) << exponent == minus << mantissa
    one = _BIAS[kind] << mantissa
    constant = 0x8000 | (_BIAS[kind] + exponent) << mantissa | digits
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
