"""Targets from the float model's outputs, and a target of its own for each width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.quant import layers

from fissile.quant.baselines import gptaq, gptq
from fissile.quant.decouple import solve
from fissile.quant.hessian import Moments
from fissile.quant.nested import NestedWeight
from fissile.quant.solvers import Evidence, float_targets


def drifted(tokens: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (T, I) of a float model, and of a quantized one that wandered off."""
    random = np.random.default_rng(seed)
    root = np.linalg.cholesky(layers.hessian(inputs, "power", seed).double().numpy())
    y = random.standard_normal((tokens, inputs)) @ root.T
    wander = np.eye(inputs) + 0.4 * random.standard_normal((inputs, inputs)) / inputs**0.5
    x = y @ wander + 0.05 * random.standard_normal((tokens, inputs)) * y.std()
    return torch.from_numpy(y).float(), torch.from_numpy(x).float()


def evidence(x: torch.Tensor, y: torch.Tensor, bits: int = 2) -> Evidence:
    moments = Moments(x.shape[1], drift=True)
    for begin in range(0, len(x), 100):
        moments.add(x[begin : begin + 100], y[begin : begin + 100])
    hessian, drift, _ = moments.finish()
    assert drift is not None
    return Evidence(hessian, {bits: drift})


def output_error(
    nested: NestedWeight, weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor
) -> float:
    """|W y - V x|^2 relative to |W y|^2 in float64."""
    want = y.double() @ weight.double().T
    got = x.double() @ nested.dequantize(nested.widths[0]).double().T
    return float((want - got).square().sum() / want.square().sum())


def test_the_target_is_the_least_squares_weight() -> None:
    y, x = drifted(600, 24)
    weight = layers.weight(9, 24)
    target = float_targets(weight, evidence(x, y), 1.0, 1e-9)[2]
    want = np.linalg.lstsq(x.double().numpy(), y.double().numpy() @ weight.double().numpy().T)[0].T
    np.testing.assert_allclose(target.numpy(), want, rtol=1e-3, atol=1e-5)
    half = float_targets(weight, evidence(x, y), 0.5, 1e-9)[2]
    torch.testing.assert_close(half, (weight + target) / 2, rtol=1e-4, atol=1e-6)


def test_a_stack_has_the_targets_of_its_layers() -> None:
    found = [evidence(x, y) for y, x in (drifted(300, 16, seed) for seed in (0, 1))]
    weight = layers.weight(2, 5, 16)
    both = Evidence(
        torch.stack([e.hessian for e in found]), {2: torch.stack([e.drift[2] for e in found])}
    )
    together = float_targets(weight, both, 0.7, 0.01)[2]
    for i in range(2):
        alone = float_targets(weight[i], found[i], 0.7, 0.01)[2]
        torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-7)


def test_targets_lower_the_error_of_outputs() -> None:
    y, x = drifted(2000, 64)
    fresh_y, fresh_x = drifted(2000, 64)
    weight, known = layers.weight(48, 64), evidence(x, y)
    targets = float_targets(weight, known, 1.0, 0.01)
    plain = solve(weight, known.hessian, widths=(2,), effort="fast")
    aimed = solve(weight, known.hessian, widths=(2,), effort="fast", targets=targets)
    assert output_error(aimed, weight, fresh_x, fresh_y) < 0.8 * output_error(
        plain, weight, fresh_x, fresh_y
    )


def test_equal_targets_change_nothing_and_own_ones_are_met() -> None:
    weight, hessian = layers.weight(24, 64), layers.hessian(64, "power")
    plain = solve(weight, hessian, effort="fast")
    same = solve(weight, hessian, effort="fast", targets={k: weight for k in (2, 3, 4)})
    assert torch.equal(plain.codes, same.codes)
    shift = 0.3 * layers.weight(24, 64, seed=5)
    targets = {2: weight, 3: weight, 4: weight + shift}
    own = solve(weight, hessian, effort="fast", targets=targets)
    for bits, target in targets.items():
        truth = layers.loss_rows(own.dequantize(bits) - target, hessian)
        torch.testing.assert_close(own.loss[bits].double(), truth, rtol=1e-5, atol=0)
    missed = layers.loss_rows(plain.dequantize(4) - targets[4], hessian).sum()
    assert own.loss[4].sum() < 0.5 * missed


def test_gptaq_is_gptq_without_drift_and_better_with_it() -> None:
    y, x = drifted(2000, 64)
    weight, known = layers.weight(32, 64), evidence(x, y)
    still = gptaq(weight, known.hessian, torch.zeros(64, 64), 2)
    plain = gptq(weight, known.hessian, 2)
    assert (still.codes != plain.codes).float().mean() < 0.01
    moved = gptaq(weight, known.hessian, known.drift[2], 2, blend=1.0)
    assert output_error(moved, weight, x, y) < 0.9 * output_error(plain, weight, x, y)


def test_a_hessian_of_another_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"hessian \(8, 8\): no fit"):
        gptaq(torch.zeros(2, 64), torch.eye(8), torch.eye(8), 2)
