"""Floats in training: their weights, their gradients, and what is stored in the end."""

from __future__ import annotations

import pytest
import torch
from tests.quant import layers

from fissile.quant.decouple import solve
from fissile.quant.nested import NestedWeight
from fissile.quant.residual import with_residual
from fissile.quant.soft import SoftFloats


@pytest.fixture(scope="module")
def nested() -> NestedWeight:
    weight, hessian = layers.weight(2, 12, 64), torch.stack([layers.hessian(64, "power")] * 2)
    return solve(weight, hessian, group_size=32, effort="fast", companding=1.5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weights_and_gradients_are_those_of_the_definition(nested: NestedWeight, bits: int) -> None:
    soft = SoftFloats(nested)
    torch.testing.assert_close(soft.dense(bits), nested.dequantize(bits), rtol=0, atol=1e-6)
    rng = torch.Generator().manual_seed(bits)
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    outer = torch.randn(nested.codes.shape, generator=rng)
    (soft.dense(bits) * outer).sum().backward()
    # In float64 from the values of the codes, with u = 2^(2 - k):
    # W = s (1 + u a) (v - m) + (z + s m) + s u b.
    step = torch.where(nested.scale[bits] > 0, nested.scale[bits], 1.0).double()
    value = (nested.dequantize(bits).double().unflatten(-1, (2, 32))) - nested.zero[bits][..., None]
    value = value / step[..., None]
    # The table is symmetric around its middle.
    middle = (max_value(nested, bits) / 2).double()
    outer_g = outer.double().unflatten(-1, (2, 32))
    scale = nested.scale[bits].double() * {2: 1.0, 3: 0.5, 4: 0.25}[bits]
    by_scale = (outer_g * (value - middle)).sum(-1) * scale
    by_zero = outer_g.sum(-1) * scale
    for moved, truth in ((soft.scale[bits], by_scale), (soft.zero[bits], by_zero)):
        assert moved.grad is not None
        torch.testing.assert_close(moved.grad.double(), truth, rtol=1e-3, atol=1e-4)


def max_value(nested: NestedWeight, bits: int) -> torch.Tensor:
    """Value of the largest code, from the tables of the format."""
    from fissile.kernels import layout

    top = torch.tensor([(1 << bits) - 1], dtype=torch.uint8)
    return layout.values(top, bits, nested.companding)


def test_what_is_stored_is_what_was_trained_and_fixed_widths_stay(nested: NestedWeight) -> None:
    soft = SoftFloats(nested, (2, 3))
    assert set(soft.scale) == {2, 3}
    with torch.no_grad():
        for parameter in soft.parameters():
            parameter.add_(0.05)
    stored = soft.finish()
    assert torch.equal(stored.codes, nested.codes)
    assert torch.equal(stored.scale[4], nested.scale[4])
    assert torch.equal(stored.zero[4], nested.zero[4])
    for bits in (2, 3):
        assert not torch.equal(stored.scale[bits], nested.scale[bits])
        size = nested.dequantize(bits).abs().max()
        torch.testing.assert_close(
            stored.dequantize(bits), soft.dense(bits), rtol=0, atol=2e-3 * float(size)
        )
        soft.revert(bits)
    again = soft.finish()
    assert all(torch.equal(again.scale[k], nested.scale[k]) for k in (2, 3, 4))


@pytest.mark.parametrize("extra", [(), (6,), (6, 8)])
@pytest.mark.parametrize("widths", [(2, 4), (2, 3, 4)])
def test_packed_parts_give_the_weight_back(widths: tuple[int, ...], extra: tuple[int, ...]) -> None:
    weight, hessian = layers.weight(8, 64), layers.hessian(64, "chain")
    made = solve(weight, hessian, widths=widths, effort="fast", companding=2.0)
    made = with_residual(made, weight, hessian, extra) if extra else made
    back = NestedWeight.from_parts(made.parts(), made.group_size, made.companding)
    assert back.widths == made.widths
    for bits in made.widths:
        assert torch.equal(back.dequantize(bits), made.dequantize(bits))


def test_one_narrow_width_comes_back_too() -> None:
    made = solve(layers.weight(8, 64), layers.hessian(64, "iid"), widths=(2,), effort="fast")
    back = NestedWeight.from_parts(made.parts(), 64)
    assert torch.equal(back.codes, made.codes)
    assert torch.equal(back.dequantize(2), made.dequantize(2))
