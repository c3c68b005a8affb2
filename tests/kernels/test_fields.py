"""The bit tricks of the kernels, executed on integers and compared with plain arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from fissile.kernels.fields import (
    STEEP,
    Float,
    affine_ptx,
    bend,
    block_codes,
    code_bits,
    codes_per_word,
    fields,
    halves,
    unpack_ptx,
)
from fissile.kernels.layout import COMPANDED
from fissile.kernels.proof.interpreter import bf16_to_float, float_to_bf16, run_ptx

KINDS: tuple[Float, ...] = ("bf16", "fp16")
CASES = [(b, kind, half) for b in (2, 3, 4, 8) for kind in KINDS for half in range(halves(b))]


def to_float(lanes: np.ndarray, kind: Float) -> np.ndarray:
    return bf16_to_float(lanes) if kind == "bf16" else lanes.view(np.float16).astype(np.float32)


def random_words(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 32, 4096, dtype=np.uint32)


def codes_of(words: np.ndarray, extra: np.ndarray, bits: int, half: int) -> list[np.ndarray]:
    """Codes by position, read the plain way from both lanes of every register."""
    step = 16 // codes_per_word(bits)
    lanes, byte = words.view(np.uint16), extra.view(np.uint16) >> (8 * half) & 0xFF
    if bits != 3:
        return [lanes >> (step * e) & ((1 << step) - 1) for e in range(codes_per_word(bits))]
    five = [lanes >> (3 * e) & 7 for e in range(5)]
    return [*five, byte & 7, byte >> 3 & 7, byte >> 6 | lanes >> 15 << 2]


@pytest.mark.parametrize(("bits", "kind", "half"), CASES)
def test_unpacked_codes_are_their_offset_plus_the_code(bits: int, kind: Float, half: int) -> None:
    words, extra = random_words(bits), random_words(bits + 10)
    count = codes_per_word(bits)
    registers = {f"${count}": words, f"${count + 1}": extra}
    out = run_ptx(unpack_ptx(bits, kind, half), registers, count)
    expected = codes_of(words, extra, bits, half)
    for field, got, want in zip(fields(bits, kind), out, expected, strict=True):
        assert np.array_equal(to_float(got.view(np.uint16), kind) - field.offset, want)


@pytest.mark.parametrize("companding", COMPANDED)
@pytest.mark.parametrize(("bits", "kind", "half"), [case for case in CASES if case[0] > 2])
def test_companded_codes_become_their_values(
    bits: int, kind: Float, half: int, companding: float
) -> None:
    """Against the stored table: what is made is (k - 1) offset + (value - v0) / 2."""
    words, extra = random_words(bits), random_words(bits + 10)
    count, steep = codes_per_word(bits), STEEP[companding]
    registers = {f"${count}": words, f"${count + 1}": extra}
    out = run_ptx(unpack_ptx(bits, kind, half, steep), registers, count)
    table = np.array(COMPANDED[companding][min(bits, 4)], dtype=np.float64)
    expected = codes_of(words, extra, bits, half)
    for field, got, want in zip(fields(bits, kind, steep), out, expected, strict=True):
        made = to_float(got.view(np.uint16), kind) - (steep - 1) * field.offset
        assert np.array_equal(2 * made + bend(bits)[2], table[want])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "centre"), [(2, 2), (3, 4), (4, 8)])
def test_scaled_weights_are_rounded_once(bits: int, centre: int, kind: Float) -> None:
    rng = np.random.default_rng(bits)
    scale, zero = rng.standard_normal(4096), rng.standard_normal(4096)

    def half_precision(values: np.ndarray) -> np.ndarray:
        single = values.astype(np.float32)
        return float_to_bf16(single) if kind == "bf16" else single.astype(np.float16).view("u2")

    scales, zeros = half_precision(scale), half_precision(zero)
    for field in fields(bits, kind):
        codes = rng.integers(0, 1 << code_bits(bits), 4096)
        value = half_precision(field.offset + codes)
        registers = {f"${i + 1}": lane.view(np.uint32) for i, lane in enumerate((value, scales))}
        registers["$3"] = zeros.view(np.uint32)
        (out,) = run_ptx(affine_ptx(kind, field.offset + centre), registers, 1)
        exact = (codes - centre) * to_float(scales, kind).astype(np.float64)
        exact += to_float(zeros, kind)
        error = np.abs(to_float(out.view(np.uint16), kind) - exact)
        unit = 2.0 ** (-8 if kind == "bf16" else -11)
        assert (error <= unit * np.abs(exact) * (1 + 1e-6) + 2.0**-24).all()


def test_offsets_stay_small_and_cover_a_block() -> None:
    for bits in (2, 3, 4, 8):
        for kind in KINDS:
            offsets = [field.offset for field in fields(bits, kind)] * halves(bits)
            assert len(offsets) * 32 == block_codes(bits)
            assert max(offsets) <= 256


def test_an_unknown_instruction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"popc\.b32"):
        run_ptx("{ popc.b32 $0, $1; }", {"$1": random_words(0)}, 1)


def test_bfloat16_rounds_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).standard_normal(10_000).astype(np.float32)
    values[:4] = [1 + 2.0**-8, 1 + 3 * 2.0**-8, np.inf, -0.0]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(float_to_bf16(values), expected)
