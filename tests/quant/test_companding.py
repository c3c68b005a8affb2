"""Companded tables: what they stand for, and that the solver gains from them where it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.quant import layers

from fissile.kernels import layout
from fissile.quant.decouple import choose_companding, solve

RATIOS = tuple(layout.COMPANDED)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("bits", [3, 4])
def test_values_are_the_middles_of_equal_parts_of_four_cells(ratio: float, bits: int) -> None:
    # Inner cells of width 1, outer ones of width `ratio`, each cut into 2^(bits - 2) equal parts.
    code = np.arange(1 << bits)
    cell, part = code >> (bits - 2), code % (1 << (bits - 2))
    left = np.array([-1 - ratio, -1, 0, 1])[cell]
    position = left + np.array([ratio, 1, 1, ratio])[cell] * (part + 0.5) / (1 << (bits - 2))
    codes = torch.from_numpy(code.astype(np.uint8))
    values = layout.values(codes, bits, ratio).numpy().astype(float)
    slope, offset = np.polyfit(position, values, 1)
    np.testing.assert_allclose(values, slope * position + offset, atol=1e-9)
    assert values[0] == 0
    assert slope > 1


def test_two_bits_and_ratio_one_are_plain_codes() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(layout.values(codes, 4, 1.0), codes)
    assert torch.equal(layout.values(codes[:4], 2, 2.0), codes[:4])
    with pytest.raises(ValueError, match=r"companding 1.7, accepted: 1 or one of \[1.5, 2.0\]"):
        layout.values(codes, 4, 1.7)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("widths", [(4,), (2, 3, 4), (3, 4)])
def test_what_is_solved_is_what_the_parts_decode_to(ratio: float, widths: tuple[int, ...]) -> None:
    weight, hessian = layers.weight(24, 64), layers.hessian(64, "outliers")
    nested = solve(weight, hessian, widths=widths, companding=ratio, effort="fast")
    assert (nested.history[1:] <= nested.history[:-1]).all()
    parts = nested.parts()
    for bits in widths:
        decoded = layout.dequantize(parts, bits, ratio)
        assert torch.equal(decoded, nested.dequantize(bits))
        truth = layers.loss_rows(decoded - weight, hessian)
        torch.testing.assert_close(nested.loss[bits].double(), truth, rtol=1e-5, atol=0)


def test_gaussian_weights_gain_at_every_width() -> None:
    weight, hessian = layers.weight(64, 128), layers.hessian(128, "power")
    plain, wide = (
        solve(weight, hessian, companding=ratio, effort="fast", group_size=128)
        for ratio in (1.0, 1.5)
    )
    for bits, most in ((2, 1.0), (3, 0.97), (4, 0.93)):
        assert wide.loss[bits].sum() < most * plain.loss[bits].sum()


@pytest.mark.parametrize("kind", ["even", "gauss"])
def test_the_table_is_chosen_by_the_objective(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if kind == "even" else torch.randn
    weight, hessian = draw(48, 128, generator=generator), layers.hessian(128, "power")
    omega = {2: 4.0, 3: 1.0, 4: 1.0}
    found = choose_companding(weight[None], hessian[None], (2, 3, 4), omega, 64, 0.01)
    final = {
        ratio: float(solve(weight, hessian, companding=ratio, effort="fast").history[-1].sum())
        for ratio in (1.0, *RATIOS)
    }
    assert final[found] == min(final.values())
    assert solve(weight, hessian, companding=None, effort="fast").companding == found
    assert (found == 1.0) == (kind == "even")


def test_two_bits_alone_have_no_table() -> None:
    weight, hessian = layers.weight(8, 64), layers.hessian(64, "power")
    assert solve(weight, hessian, widths=(2,), companding=None, effort="fast").companding == 1.0
