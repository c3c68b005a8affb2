"""The float step against numpy's least squares on the square root of H."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.quant.test_integers import problem, visiting

from fissile.quant.floats import refit
from fissile.quant.integers import Floats, start
from fissile.quant.metric import take


def least_squares(
    weight_I: np.ndarray, value_I: np.ndarray, h_II: np.ndarray, groups: int
) -> float:
    """Smallest loss over the scales and zeros of all groups together."""
    member = np.repeat(np.eye(groups), len(value_I) // groups, axis=0)
    design = np.concatenate([member * value_I[:, None], member], axis=1)
    root = np.linalg.cholesky(h_II).T
    theta = np.linalg.lstsq(root @ design, root @ weight_I, rcond=None)[0]
    return float(((root @ (design @ theta - weight_I)) ** 2).sum())


@pytest.mark.parametrize("kind", ["iid", "power", "chain", "outliers"])
@pytest.mark.parametrize("group_size", [8, 16, 64])
def test_refit_is_the_coupled_least_squares_solution(kind: str, group_size: int) -> None:
    rows, inputs = 7, 64
    weight, metric, levels, floats = problem(rows, inputs, group_size, (2, 3, 4), kind)
    # Rounded rather than random codes: those would ask for negative scales, which are refused.
    codes_BIO = start(visiting(weight, metric), metric, levels, floats)
    codes_OI = take(codes_BIO, metric.inverse_BI)[0].T
    fit = refit(weight, metric, levels, floats, codes_BIO)
    h = metric.h_BII[0].double().numpy()
    for w in range(3):
        value = levels.value_WQ[w].double().numpy()[codes_OI.long().numpy()]
        for o in range(rows):
            row = weight[0, o].double().numpy()
            want = least_squares(row, value[o], h, inputs // group_size)
            # The floats are rounded to float16: slightly above the optimum, never below.
            assert want * (1 - 1e-5) <= fit.after_WBO[w, 0, o] <= want * (1 + 1e-3)


def test_reported_losses_are_those_of_the_returned_floats() -> None:
    weight, metric, levels, floats = problem(9, 48, 16, (2, 4), "outliers")
    generator = torch.Generator().manual_seed(0)
    codes_BIO = torch.randint(0, 16, (1, 48, 9), generator=generator, dtype=torch.uint8)
    fit = refit(weight, metric, levels, floats, codes_BIO)
    h = metric.h_BII[0].double()
    codes_OI = take(codes_BIO, metric.inverse_BI)[0].T.long()

    def loss(maps: Floats, w: int) -> torch.Tensor:
        scale, zero = (x[0, :, w].T.double() for x in (maps.scale_BGWO, maps.zero_BGWO))
        value = levels.value_WQ[w].double()[codes_OI].unflatten(1, (3, 16))
        error = (value * scale[..., None] + zero[..., None]).flatten(1) - weight[0].double()
        return ((error @ h) * error).sum(1)

    for w in range(2):
        torch.testing.assert_close(fit.before_WBO[w, 0], loss(floats, w), rtol=1e-5, atol=0)
        torch.testing.assert_close(fit.after_WBO[w, 0], loss(fit.floats, w), rtol=1e-4, atol=0)
    assert (fit.after_WBO <= fit.before_WBO).all()
    again = refit(weight, metric, levels, fit.floats, codes_BIO)
    assert (again.after_WBO <= fit.after_WBO * (1 + 1e-4)).all()


def test_groups_with_a_single_code_keep_their_scale() -> None:
    weight, metric, levels, floats = problem(4, 32, 8, (2, 3, 4), "power")
    codes_BIO = torch.full((1, 32, 4), 5, dtype=torch.uint8)
    fit = refit(weight, metric, levels, floats, codes_BIO)
    assert torch.isfinite(fit.floats.scale_BGWO).all()
    assert (fit.floats.scale_BGWO > 0).all()
    assert (fit.after_WBO < fit.before_WBO).all()
