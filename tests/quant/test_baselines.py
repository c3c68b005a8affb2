"""The baselines against their textbook definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.quant import layers

from fissile.kernels import layout
from fissile.quant.baselines import gptq, rtn


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rtn_is_the_nearest_level_of_the_min_max_grid(bits: int) -> None:
    weight = layers.weight(9, 64, heavy=True)
    nested = rtn(weight, bits, group_size=16)
    grouped = weight.double().unflatten(1, (4, 16)).numpy()
    low, high = grouped.min(-1), grouped.max(-1)
    step = (high - low) / (2**bits - 1)
    np.testing.assert_allclose(nested.scale[bits], step, rtol=1e-3)
    np.testing.assert_allclose(nested.zero[bits], low, rtol=1e-3)
    error = nested.dequantize(bits).double().unflatten(1, (4, 16)).numpy() - grouped
    assert (np.abs(error) <= step[..., None] * 0.501 + 2e-4 * np.abs(low)[..., None]).all()
    assert nested.widths == (bits,)
    torch.testing.assert_close(
        nested.loss[bits].double(), (nested.dequantize(bits) - weight).double().square().sum(1)
    )


@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_textbook_column_loop(bits: int) -> None:
    inputs, top = 96, 2**bits - 1
    weight, hessian = layers.weight(8, inputs), layers.hessian(inputs, "outliers")
    nested = gptq(weight, hessian, bits, group_size=16)
    grid = rtn(weight, bits, group_size=16)
    assert torch.equal(nested.scale[bits], grid.scale[bits])
    damped = hessian.double().numpy()
    damped = damped + 0.01 * np.mean(np.diag(damped)) * np.eye(inputs)
    order = np.argsort(-np.diag(hessian.numpy()), kind="stable")
    factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    working = weight.double().numpy()[:, order]
    codes = np.zeros((8, inputs), dtype=np.uint8)
    for j, column in enumerate(order):
        scale, zero = (x[bits][:, column // 16].double().numpy() for x in (grid.scale, grid.zero))
        codes[:, column] = np.clip(np.rint((working[:, j] - zero) / scale), 0, top)
        error = (working[:, j] - (codes[:, column] * scale + zero)) / factor[j, j]
        working[:, j:] -= error[:, None] * factor[j, j:]
    assert np.mean((nested.codes >> (4 - bits)).numpy() != codes) < 0.01


def test_batches_are_solved_layer_by_layer() -> None:
    weight = layers.weight(2, 8, 64)
    hessian = torch.stack([layers.hessian(64, "power", seed) for seed in (0, 1)])
    together = gptq(weight, hessian, 3)
    for i in range(2):
        assert torch.equal(gptq(weight[i], hessian[i], 3).codes, together.codes[i])
        assert torch.equal(rtn(weight, 3).codes[i], rtn(weight[i], 3).codes)
    assert together.loss[3].shape == (2, 8)
    assert list(together.parts()) == list(layout.stored_names((3,)))


def test_constant_groups_are_exact() -> None:
    weight = torch.full((2, 64), -0.5)
    assert torch.equal(rtn(weight, 2).dequantize(2), weight)
    assert torch.equal(gptq(weight, layers.hessian(64, "power"), 2).dequantize(2), weight)


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match=r"bits 5 is not one of"):
        rtn(torch.zeros(2, 64), 5)
    with pytest.raises(ValueError, match="group_size 48 does not divide K 64"):
        rtn(torch.zeros(2, 64), 2, 48)
    with pytest.raises(ValueError, match="does not fit float16"):
        rtn(torch.full((2, 64), torch.nan), 2)
    with pytest.raises(ValueError, match=r"hessian \(8, 8\): no fit"):
        gptq(torch.zeros(2, 64), torch.eye(8), 2)
