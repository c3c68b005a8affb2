"""Six and eight bits from a second code."""

from __future__ import annotations

import math

import pytest
import torch
from tests.quant import layers

from fissile.kernels import layout
from fissile.quant.decouple import solve
from fissile.quant.residual import with_residual


@pytest.mark.parametrize("extra", [(6,), (8,), (6, 8)])
@pytest.mark.parametrize("base", [(4,), (2, 3, 4)])
def test_wider_widths_add_to_four_bits(base: tuple[int, ...], extra: tuple[int, ...]) -> None:
    weight, hessian = layers.weight(24, 64), layers.hessian(64, "power")
    nested = solve(weight, hessian, widths=base, companding=1.5, effort="fast")
    whole = with_residual(nested, weight, hessian, extra)
    assert whole.widths == (*base, *extra)
    parts = whole.parts()
    assert list(parts) == list(layout.stored_names(whole.widths))
    for bits in whole.widths:
        own = {name: parts[name] for name in layout.segment_names(bits, whole.widths)}
        decoded = layout.dequantize(own, bits, 1.5)
        assert torch.equal(decoded, whole.dequantize(bits))
        truth = layers.loss_rows(decoded - weight, hessian)
        torch.testing.assert_close(whole.loss[bits].double(), truth, rtol=1e-5, atol=1e-12)
    assert torch.equal(whole.dequantize(4), nested.dequantize(4))


def test_eight_bits_are_worth_more_than_six_and_a_half() -> None:
    weight, hessian = layers.weight(64, 128), layers.hessian(128, "power")
    whole = with_residual(solve(weight, hessian, effort="fast"), weight, hessian)
    losses = {bits: float(whole.loss[bits].sum()) for bits in whole.widths}
    # A bit is worth a quarter of the loss; counted from the dedicated code of 4 bits.
    four = float(solve(weight, hessian, widths=(4,)).loss[4].sum())
    assert 4 + math.log(four / losses[8], 4) > 6.5
    assert 4 + math.log(four / losses[6], 4) > 4.7


def test_bytes_are_counted() -> None:
    shape = (3, 10, 96)
    assert layout.bits_per_weight((512, 256), 64, 6) == 4.5 + 2.5
    assert layout.bits_per_weight((512, 256), 64, 8) == 4.5 + 4.5
    widths = (2, 4, 8)
    sizes = {
        name: math.prod(layout.part_shape(name, shape, 32)) * (2 if "theta" in name else 1)
        for name in layout.stored_names(widths)
    }
    assert "plane_6" in sizes
    assert "theta_6" not in sizes
    assert layout.stored_bytes(shape, 32, widths) == sum(sizes.values())


def test_misuse_is_named() -> None:
    weight, hessian = layers.weight(4, 64), layers.hessian(64, "power")
    two = solve(weight, hessian, widths=(2,), effort="fast")
    with pytest.raises(ValueError, match=r"widths \[2\]: 6 and 8 bits are added to 4"):
        with_residual(two, weight, hessian)
    four = solve(weight, hessian, widths=(4,), effort="fast")
    with pytest.raises(ValueError, match=r"residual widths \[7\], accepted: 6, 8"):
        with_residual(four, weight, hessian, (7,))
