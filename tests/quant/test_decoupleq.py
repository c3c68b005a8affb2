"""decoupleQ as published: monotone, better than GPTQ by its own rounds, behind our solver."""

from __future__ import annotations

import pytest
import torch
from tests.quant import layers

from fissile.quant.baselines import gptq
from fissile.quant.decouple import solve
from fissile.quant.decoupleq import FirstLevel, decoupleq
from fissile.quant.decoupleq_dense import decoupleq_dense


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_row_gets_worse_and_the_loss_is_the_true_one(bits: int) -> None:
    weight, hessian = layers.weight(40, 128), 0.003 * layers.hessian(128, "power")
    nested = decoupleq(weight, hessian, bits)
    assert len(nested.history) > 2
    assert (nested.history[1:] <= nested.history[:-1]).all()
    error = nested.dequantize(bits) - weight
    truth = layers.loss_rows(error, hessian)
    torch.testing.assert_close(nested.loss[bits].double(), truth, rtol=1e-5, atol=0)
    damped = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(128)
    objective = layers.loss_rows(error, damped)
    torch.testing.assert_close(nested.history[-1], objective, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["power", "outliers"])
def test_its_rounds_beat_gptq_and_ours_beats_it(kind: str) -> None:
    weight, hessian = layers.weight(64, 256), layers.hessian(256, kind)
    once = decoupleq(weight, hessian, 2, alternations=1).loss[2].sum()
    four = decoupleq(weight, hessian, 2, alternations=4).loss[2].sum()
    assert once < 1.1 * gptq(weight, hessian, 2).loss[2].sum()
    assert four < 0.85 * once
    ours = solve(weight, hessian, widths=(2,)).loss[2].sum()
    assert ours < 0.97 * four


def test_the_first_approximation_keeps_the_box() -> None:
    # A group as long as the row leaves much outside the range, which is what it is for.
    weight, hessian = layers.weight(12, 64, heavy=True), layers.hessian(64, "power")
    second = decoupleq(weight, hessian, 2, group_size=64)
    work = FirstLevel(warm_up=50, inner=8)
    first = decoupleq(weight, hessian, 2, 64, approximation="first", first_level=work)
    assert (first.history[1:] <= first.history[:-1]).all()
    assert first.loss[2].sum() < 0.985 * second.loss[2].sum()


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, hessian = layers.weight(16, 64), layers.hessian(64, "chain")
    large, small = (decoupleq(weight, unit * hessian, 2) for unit in (1.0, 1e-6))
    assert (large.codes != small.codes).float().mean() < 0.01


def test_batches_and_misuse() -> None:
    weight = layers.weight(2, 8, 64)
    hessian = torch.stack([layers.hessian(64, "power", seed) for seed in (0, 1)])
    together = decoupleq(weight, hessian, 3)
    for i in range(2):
        alone = decoupleq(weight[i], hessian[i], 3)
        assert (alone.codes != together.codes[i]).float().mean() < 0.02
    assert together.history.shape[1:] == (2, 8)
    with pytest.raises(ValueError, match=r"bits 8 is not one of"):
        decoupleq(weight[0], hessian[0], 8)
    with pytest.raises(ValueError, match=r"hessian \(2, 64, 64\): no fit"):
        decoupleq(weight[0], hessian, 2)


@pytest.mark.parametrize("alternations", [1, 4])
@pytest.mark.parametrize("kind", ["power", "chain"])
def test_the_dense_formulation_is_the_same_algorithm(kind: str, alternations: int) -> None:
    weight, hessian = layers.weight(40, 128), layers.hessian(128, kind)
    dense = decoupleq_dense(weight, hessian, 2, 64, alternations=alternations)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)
    truth = layers.loss_rows(dense.weight_OI - weight, damped)
    torch.testing.assert_close(dense.loss_O, truth, rtol=1e-4, atol=0)
    for row in dense.weight_OI.unflatten(1, (2, 64)).flatten(0, 1):
        assert len(row.unique()) <= 4
    ours = decoupleq(weight, hessian, 2, 64, alternations=alternations)
    own = layers.loss_rows(ours.dequantize(2) - weight, damped).sum()
    assert 0.93 < float(dense.loss_O.sum() / own) < 1.07
    steps = {"integers"} if alternations == 1 else {"integers", "search", "floats"}
    assert set(dense.seconds) == steps
