"""The integer step against a textbook loop, the loss identity and exhaustive search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from tests.quant import layers

from fissile.quant.integers import Floats, Levels, descend, start
from fissile.quant.metric import Metric, prepare, take
from fissile.quant.ranges import initial_floats, search

OMEGA = {2: 4.0, 3: 1.0, 4: 1.0}
SHRINKS = (0.4, 0.6, 0.8, 1.0)


def problem(
    rows: int, inputs: int, group_size: int, widths: tuple[int, ...], kind: str, seed: int = 0
) -> tuple[torch.Tensor, Metric, Levels, Floats]:
    """One layer: natural weights (1, O, I), metric, levels and starting floats."""
    weight = layers.weight(1, rows, inputs, seed=seed)
    metric = prepare(layers.hessian(inputs, kind, seed)[None], group_size, damp=0.01)
    levels = Levels.build(widths, OMEGA, torch.device("cpu"))
    diagonal = metric.h_BII.diagonal(dim1=1, dim2=2)
    ranges = search(weight, diagonal, levels, group_size, SHRINKS)
    return weight, metric, levels, initial_floats(*ranges, levels, 1.0)


def visiting(weight_BOI: torch.Tensor, metric: Metric) -> torch.Tensor:
    return take(weight_BOI.transpose(1, 2).contiguous(), metric.order_BI)


def decoded(codes_BIO: torch.Tensor, metric: Metric, levels: Levels, floats: Floats) -> np.ndarray:
    """All widths in visiting order, float64 (W, O, I), of the first layer."""
    value = levels.value_WQ.double().numpy()
    codes, group = codes_BIO[0].T.long().numpy(), metric.group_BI[0].numpy()
    scale = floats.scale_BGWO[0].double().numpy()[group]
    zero = floats.zero_BGWO[0].double().numpy()[group]
    return np.stack(
        [scale[:, w].T * value[w][codes] + zero[:, w].T for w in range(len(levels.widths))]
    )


def objective(
    weight: torch.Tensor, codes_BIO: torch.Tensor, metric: Metric, levels: Levels, floats: Floats
) -> np.ndarray:
    """Independent float64 objective of every row."""
    order = metric.order_BI[0].numpy()
    h = metric.h_BII[0].double().numpy()[np.ix_(order, order)]
    error = decoded(codes_BIO, metric, levels, floats) - weight[0].double().numpy()[:, order]
    return np.einsum("w,woi,ij,woj->o", levels.weight_W.double().numpy(), error, h, error)


def textbook_gptq(
    weight: torch.Tensor, metric: Metric, levels: Levels, floats: Floats
) -> tuple[np.ndarray, np.ndarray]:
    """Column by column with the inverse factor; codes (I, O) and loss of each width (W, O)."""
    order, group = metric.order_BI[0].numpy(), metric.group_BI[0].numpy()
    h = metric.h_BII[0].double().numpy()[np.ix_(order, order)]
    factor = np.linalg.cholesky(np.linalg.inv(h)).T
    lam, value = levels.weight_W.double().numpy(), levels.value_WQ.double().numpy()
    working = np.repeat(weight[0].double().numpy()[None][:, :, order], len(lam), axis=0)
    codes, loss = [], np.zeros(working.shape[:2])
    for j in range(h.shape[0]):
        scale = floats.scale_BGWO[0, group[j]].double().numpy()[:, :, None]
        zero = floats.zero_BGWO[0, group[j]].double().numpy()[:, :, None]
        table = scale * value[:, None, :] + zero
        cost = (lam[:, None, None] * (table - working[:, :, j, None]) ** 2).sum(0)
        codes.append(cost.argmin(-1))
        chosen = np.take_along_axis(table, codes[-1][None, :, None], axis=2)[:, :, 0]
        error = (working[:, :, j] - chosen) / factor[j, j]
        loss += error**2
        working[:, :, j:] -= error[:, :, None] * factor[j, j:]
    return np.stack(codes), loss


@pytest.mark.parametrize("widths", [(2,), (2, 4), (2, 3, 4)])
@pytest.mark.parametrize("kind", ["power", "outliers"])
def test_start_is_multi_state_gptq(widths: tuple[int, ...], kind: str) -> None:
    # 136 inputs: more than two blocks and a ragged last one.
    weight, metric, levels, floats = problem(24, 136, 8, widths, kind)
    codes = start(visiting(weight, metric), metric, levels, floats)
    expected, _ = textbook_gptq(weight, metric, levels, floats)
    # float32 against float64: a tie may fall the other way and change the columns after it.
    assert np.mean(codes[0].numpy() != expected) < 0.02


def test_greedy_losses_add_up_to_the_loss_of_each_width() -> None:
    weight, metric, levels, floats = problem(16, 64, 16, (2, 3, 4), "power")
    codes, greedy_loss_WO = textbook_gptq(weight, metric, levels, floats)
    order = metric.order_BI[0].numpy()
    h = metric.h_BII[0].double().numpy()[np.ix_(order, order)]
    codes_BIO = torch.from_numpy(codes)[None].to(torch.uint8)
    error = decoded(codes_BIO, metric, levels, floats) - weight[0].double().numpy()[:, order]
    direct = np.einsum("woi,ij,woj->wo", error, h, error)
    np.testing.assert_allclose(greedy_loss_WO, direct, rtol=1e-9)
    # The same identity with the factor that the solver uses.
    unit = metric.feedback_BII[0].double().numpy() + np.eye(len(order))
    factored = (metric.pivot_BI[0].double().numpy() * (error @ unit) ** 2).sum(-1)
    np.testing.assert_allclose(factored, direct, rtol=1e-5)


@pytest.mark.parametrize("widths", [(3,), (2, 3, 4)])
def test_a_sweep_tries_every_code_of_every_column_in_turn(widths: tuple[int, ...]) -> None:
    weight, metric, levels, floats = problem(6, 72, 8, widths, "chain")
    top, rows = 1 << widths[-1], np.arange(6)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, top, (1, 72, 6), generator=generator, dtype=torch.uint8)
    swept = descend(visiting(weight, metric), metric, levels, floats, codes, sweeps=1)
    for column in range(72):
        trials = [codes.clone() for _ in range(top)]
        for code, trial in enumerate(trials):
            trial[:, column] = code
        costs = np.stack([objective(weight, t, metric, levels, floats) for t in trials])
        codes[0, column] = torch.from_numpy(costs.argmin(0))
        # A tie may fall the other way in float32; the choice must be as good.
        taken = costs[swept[0, column].numpy(), rows]
        np.testing.assert_allclose(taken, costs.min(0), rtol=1e-4)
        codes[0, column] = swept[0, column]


@pytest.mark.parametrize("widths", [(3,), (2, 3, 4)])
def test_descent_never_raises_the_objective(widths: tuple[int, ...]) -> None:
    weight, metric, levels, floats = problem(6, 72, 8, widths, "outliers")
    weight_BIO = visiting(weight, metric)
    codes = torch.zeros(weight_BIO.shape, dtype=torch.uint8)
    last = first = objective(weight, codes, metric, levels, floats)
    for _ in range(8):
        codes = descend(weight_BIO, metric, levels, floats, codes, sweeps=1)
        now = objective(weight, codes, metric, levels, floats)
        assert (now <= last * (1 + 1e-6)).all()
        last = now
    assert (last < 0.2 * first).all()


def test_uncorrelated_inputs_make_both_steps_exact() -> None:
    weight, metric, levels, floats = problem(40, 16, 8, (2, 3, 4), "iid")
    weight_BIO = visiting(weight, metric)
    tables = torch.arange(16, dtype=torch.uint8)[:, None, None, None].expand(16, 1, 16, 40)
    errors = np.stack([decoded(t, metric, levels, floats) for t in tables])
    errors -= weight[0].double().numpy()[:, metric.order_BI[0].numpy()]
    cost = np.einsum("w,qwoi->qoi", levels.weight_W.double().numpy(), errors**2)
    best = cost.argmin(0).T
    codes = start(weight_BIO, metric, levels, floats)
    assert np.mean(codes[0].numpy() != best) < 0.005  # ties
    polished = descend(weight_BIO, metric, levels, floats, torch.zeros_like(codes), sweeps=1)
    assert torch.equal(polished, codes)


@pytest.mark.parametrize(("widths", "inputs"), [((2,), 5), ((2, 3, 4), 4)])
def test_the_exhaustive_optimum_is_never_beaten_and_never_left(
    widths: tuple[int, ...], inputs: int
) -> None:
    rows, top = 12, 1 << widths[-1]
    weight, metric, levels, floats = problem(rows, inputs, inputs, widths, "chain")
    weight_BIO = visiting(weight, metric)
    order = metric.order_BI[0].numpy()
    h = metric.h_BII[0].double().numpy()[np.ix_(order, order)]
    scale, zero = (x[0, 0].double().numpy() for x in (floats.scale_BGWO, floats.zero_BGWO))
    grid_NI = np.array(list(product(range(top), repeat=inputs)), dtype=np.uint8)
    value_WNI = levels.value_WQ.double().numpy()[:, grid_NI]
    best, optimum = np.empty(rows), np.empty((rows, inputs), dtype=np.uint8)
    for o in range(rows):
        error = scale[:, o, None, None] * value_WNI + zero[:, o, None, None]
        error -= weight_BIO[0, :, o].double().numpy()
        cost = np.einsum("w,wni,wni->n", levels.weight_W.double().numpy(), error @ h, error)
        best[o], optimum[o] = cost.min(), grid_NI[cost.argmin()]
    optimal = torch.from_numpy(optimum.T.copy())[None]
    assert torch.equal(descend(weight_BIO, metric, levels, floats, optimal, sweeps=3), optimal)
    greedy = start(weight_BIO, metric, levels, floats)
    polished = descend(weight_BIO, metric, levels, floats, greedy, sweeps=4)
    found = objective(weight, polished, metric, levels, floats)
    assert (found >= best * (1 - 1e-5)).all()
    assert np.sum(found <= best * (1 + 1e-4)) >= rows // 3


def test_the_range_search_scores_as_the_joint_scalar_encoder_does() -> None:
    weight = layers.weight(1, 5, 32, seed=3, heavy=True)
    diagonal = torch.rand(1, 32, generator=torch.Generator().manual_seed(0)) + 0.1
    levels = Levels.build((2, 3, 4), OMEGA, torch.device("cpu"))
    centre, half = search(weight, diagonal, levels, 16, SHRINKS)
    grouped = weight[0].double().unflatten(1, (2, 16)).numpy()
    columns = diagonal[0].double().unflatten(0, (2, 16)).numpy()
    lam, value = levels.weight_W.double().numpy(), levels.value_WQ.double().numpy()
    step = np.array([2.0 ** (4 - k) for k in (2, 3, 4)]) * 2 / 15
    for o, g in product(range(5), range(2)):
        x = grouped[o, g]
        reach = (x.max() - x.min()) / 2
        scores = {}
        for middle, shrink in product(((x.max() + x.min()) / 2, x.mean()), SHRINKS):
            table = (value * step[:, None])[:, :, None] * reach * shrink + middle
            cost = (lam[:, None, None] * (table - x) ** 2).sum(0).min(0)
            scores[(cost * columns[g]).sum()] = (middle, reach * shrink)
        want = scores[min(scores)]
        np.testing.assert_allclose([centre[0, o, g], half[0, o, g]], want, rtol=1e-4)
