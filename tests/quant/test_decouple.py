"""The whole solver: never worse, exact where theory is, above the baselines, hard to break."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.quant import layers
from torch import Tensor

from fissile.config import Effort
from fissile.kernels import layout
from fissile.quant import alternate, integers
from fissile.quant.baselines import gptq, rtn
from fissile.quant.decouple import solve
from fissile.quant.effort import PLANS
from fissile.quant.nested import NestedWeight

EFFORTS: tuple[Effort, ...] = ("fast", "balanced", "best")
LAMBDA = torch.tensor([3 * 16, 64.0, 256.0], dtype=torch.float64)


def total(nested: NestedWeight, bits: int) -> float:
    return float(nested.loss[bits].double().sum())


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("kind", ["power", "outliers"])
def test_the_objective_of_a_row_never_rises_and_is_the_true_one(kind: str, effort: Effort) -> None:
    weight, hessian = layers.weight(40, 128), 37.0 * layers.hessian(128, kind)
    nested = solve(weight, hessian, effort=effort)
    history = nested.history
    assert history.shape[1:] == (40,)
    assert len(history) >= 2
    assert (history[1:] <= history[:-1]).all()
    assert (history[-1] < history[0]).any()
    damped = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(128)
    errors = torch.stack([nested.dequantize(k) - weight for k in (2, 3, 4)])
    truth = torch.einsum("w,wo->o", LAMBDA / LAMBDA.sum(), layers.loss_rows(errors, damped))
    torch.testing.assert_close(history[-1], truth, rtol=1e-4, atol=0)


def test_reported_loss_is_that_of_the_artifact() -> None:
    weight, hessian = layers.weight(2, 24, 64), torch.stack([layers.hessian(64, "chain")] * 2)
    nested = solve(weight, 0.003 * hessian, effort="fast", group_size=32)
    parts = nested.parts()
    for bits in (2, 3, 4):
        decoded = layout.dequantize(parts, bits)
        assert torch.equal(decoded, nested.dequantize(bits))
        truth = layers.loss_rows(decoded - weight, 0.003 * hessian)
        torch.testing.assert_close(nested.loss[bits].double(), truth, rtol=1e-5, atol=0)
    assert sum(p.numel() * p.element_size() for p in parts.values()) == layout.stored_bytes(
        weight.shape, 32
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_one_width_is_a_dedicated_code(bits: int) -> None:
    weight, hessian = layers.weight(32, 64), layers.hessian(64, "power")
    nested = solve(weight, hessian, widths=(bits,))
    assert (nested.codes & ((1 << (4 - bits)) - 1) == 0).all()
    assert set((nested.codes >> (4 - bits)).unique().tolist()) == set(range(1 << bits))
    assert list(nested.parts()) == list(layout.stored_names((bits,)))
    # With one width its weight is only a unit.
    other = solve(weight, hessian, widths=(bits,), omega={bits: 7.0})
    assert torch.equal(nested.codes, other.codes)
    assert torch.equal(nested.scale[bits], other.scale[bits])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_width_with_all_the_weight_is_served_as_if_alone(bits: int) -> None:
    weight, hessian = layers.weight(96, 128), layers.hessian(128, "power")
    omega = {2: 1.0, 3: 1.0, 4: 1.0, bits: 1e5}
    nested = solve(weight, hessian, omega=omega, effort="best")
    alone = solve(weight, hessian, widths=(bits,), effort="best")
    assert total(nested, bits) / total(alone, bits) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("relative", "expected"),
    [
        ((1, 1, 1), (1.081, 1.010, 1.053)),
        ((4, 1, 1), (1.032, 1.010, 1.155)),
        ((1, 1, 4), (1.141, 1.042, 1.008)),
    ],
)
def test_gaussian_weights_lose_what_scalar_theory_says(
    relative: tuple[int, ...], expected: tuple[float, ...]
) -> None:
    # One long group, uncorrelated inputs: the mean squared error of the best nested scalar
    # quantizer over that of the best uniform one of each width, from a dense grid of the density.
    dedicated = {2: 0.11885, 3: 0.03744, 4: 0.011544}
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, correction=0, keepdim=True)
    omega = {k: w / dedicated[k] / 4**k for k, w in zip(dedicated, relative, strict=True)}
    nested = solve(weight, torch.eye(1024), group_size=1024, omega=omega)
    for (bits, unit), ratio in zip(dedicated.items(), expected, strict=True):
        assert total(nested, bits) / weight.numel() / unit == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("kind", ["power", "chain", "outliers"])
@pytest.mark.parametrize("heavy", [False, True])
def test_alternation_beats_gptq_and_rounding(kind: str, heavy: bool) -> None:
    weight, hessian = layers.weight(64, 256, heavy=heavy), layers.hessian(256, kind)
    nested = solve(weight, hessian)
    for bits in (2, 3, 4):
        alone = total(solve(weight, hessian, widths=(bits,), effort="fast"), bits)
        plain = total(gptq(weight, hessian, bits), bits)
        assert alone < 0.97 * plain
        assert plain < total(rtn(weight, bits, hessian=hessian), bits)
        if bits < 4:  # at 4 bits one code for three widths may cost more than GPTQ's own
            assert total(nested, bits) < {2: 0.7, 3: 1.05}[bits] * plain


def test_nesting_costs_no_more_than_known() -> None:
    weight, hessian = layers.weight(64, 256), layers.hessian(256, "power")
    nested = solve(weight, hessian, group_size=128, omega={2: 4.0, 3: 1.0, 4: 1.0})
    for bits, most in ((2, 1.15), (3, 1.2), (4, 1.47)):
        alone = solve(weight, hessian, widths=(bits,), group_size=128)
        assert 1 < total(nested, bits) / total(alone, bits) < most


def test_more_effort_is_better() -> None:
    weight, hessian = layers.weight(64, 128), layers.hessian(128, "outliers")
    finals = [float(solve(weight, hessian, effort=e).history[-1].sum()) for e in EFFORTS]
    assert finals[0] > 1.02 * finals[1]
    assert finals[1] > 1.005 * finals[2]


@pytest.mark.parametrize("effort", ["balanced", "best"])
def test_a_falling_ridge_ends_lower_than_the_same_work_under_the_last(
    effort: Effort, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = layers.weight(64, 256), layers.hessian(256, "outliers")
    falling = float(solve(weight, hessian, effort=effort).history[-1].sum())
    flat = replace(PLANS[effort], ridges=(1.0,) * len(PLANS[effort].ridges))
    monkeypatch.setitem(PLANS, effort, flat)
    assert falling < 0.995 * float(solve(weight, hessian, effort=effort).history[-1].sum())


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_plan_counts_the_work_of_a_solve(effort: Effort, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def counted(weight_BIO: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows.append(weight_BIO.shape[-1])
        return integers.descend(weight_BIO, *args, **kwargs)

    monkeypatch.setattr(alternate, "descend", counted)
    outputs, plan = 16, PLANS[effort]
    solve(layers.weight(outputs, 64), layers.hessian(64, "power"), effort=effort, companding=1.0)
    assert sum(rows) == outputs * (plan.proposals + plan.rounds)


def test_sampled_floats_stay_inside_float16() -> None:
    weight, hessian = layers.weight(16, 64), layers.hessian(64, "power")
    weight *= 65000 / weight.abs().max()
    nested = solve(weight, hessian, effort="best")
    size = layers.loss_rows(weight, hessian)
    for bits in (2, 3, 4):
        assert nested.dequantize(bits).isfinite().all()
        assert (nested.loss[bits] < 0.3 * size).all()


@pytest.mark.parametrize("effort", ["fast", "balanced"])
def test_a_batch_is_its_layers_one_by_one(effort: Effort) -> None:
    weight = layers.weight(3, 32, 64)
    kinds = ("power", "chain", "outliers")
    hessian = torch.stack([layers.hessian(64, kind, seed) for seed, kind in enumerate(kinds)])
    together = solve(weight, hessian, group_size=32, effort=effort)
    assert together.codes.shape == weight.shape
    for i in range(3):
        alone = solve(weight[i], hessian[i], group_size=32, effort=effort)
        assert alone.codes.shape == weight.shape[1:]
        # Sums are taken in another order, so a rare tie falls the other way.
        assert (alone.codes != together.codes[i]).float().mean() < 0.01
        for bits in (2, 3, 4):
            torch.testing.assert_close(
                alone.loss[bits].sum(), together.loss[bits][i].sum(), rtol=5e-3, atol=0
            )


def test_rows_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layers.weight(200, 64), layers.hessian(64, "power")
    whole = solve(weight, hessian)
    monkeypatch.setattr("fissile.quant.decouple.ERROR_VALUES", 1)
    pieces = solve(weight, hessian)
    assert pieces.history.shape == whole.history.shape
    assert (pieces.codes != whole.codes).float().mean() < 0.01
    torch.testing.assert_close(pieces.loss[2].sum(), whole.loss[2].sum(), rtol=2e-3, atol=0)


def test_the_same_arguments_give_the_same_bytes() -> None:
    weight, hessian = layers.weight(48, 64), layers.hessian(64, "power")
    first, second = (solve(weight, hessian, seed=3).parts() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = solve(weight, hessian, seed=4)
    assert not torch.equal(other.parts()["plane_4"], first["plane_4"])


def test_degenerate_rows_and_inputs() -> None:
    weight, hessian = layers.weight(6, 64), layers.hessian(64, "power")
    weight[0] = 0
    weight[1] = 0.25
    weight[2, :32] = -0.125
    weight[3] *= 1e-4
    weight[4, 5] = 3.0
    hessian[7] = hessian[:, 7] = 0  # an input that is always 0
    nested = solve(weight, hessian, group_size=32)
    for bits in (2, 3, 4):
        decoded = nested.dequantize(bits)
        assert (decoded[0] == 0).all()
        assert (decoded[1] == 0.25).all()
        assert (nested.scale[bits] >= 0).all()
        size = layers.loss_rows(weight, hessian)
        assert (nested.loss[bits][3:] < 0.3 * size[3:]).all()


def test_a_layer_that_saw_no_token_gets_plain_squared_error() -> None:
    weight = layers.weight(2, 24, 64)
    hessian = torch.stack([torch.zeros(64, 64), layers.hessian(64, "power")])
    nested = solve(weight, hessian)
    plain = solve(weight[0], torch.eye(64))
    assert (nested.codes[0] != plain.codes).float().mean() < 0.01
    assert (nested.loss[4][0] == 0).all()


def test_a_rank_deficient_hessian_is_damped() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    weight = layers.weight(16, 64)
    nested = solve(weight, x.T @ x / 5)
    assert total(nested, 4) < 0.01 * layers.loss_rows(weight, x.T @ x / 5).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_type(dtype: torch.dtype) -> None:
    weight, hessian = layers.weight(16, 64).to(dtype), layers.hessian(64, "power")
    nested = solve(weight, hessian.double(), effort="fast")
    same = solve(weight.float(), hessian, effort="fast")
    assert torch.equal(nested.codes, same.codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 48}, "group_size 48 does not divide K 64"),
        (
            {"weight": torch.zeros(4, 12), "hessian": torch.eye(12), "group_size": 12},
            "K 12 .* of 8",
        ),
        ({"hessian": torch.eye(32)}, r"weight \(4, 64\) and hessian \(32, 32\) do not fit"),
        ({"weight": torch.full((4, 64), torch.nan)}, "weight holds a value that is not finite"),
        ({"hessian": torch.full((64, 64), torch.inf)}, "hessian holds a value that is not finite"),
        ({"hessian": -torch.eye(64)}, "negative diagonal entry -1"),
        ({"hessian": torch.ones(64, 64) - 40 * (1 - torch.eye(64))}, "not positive semi-definite"),
        ({"weight": torch.zeros(0, 64)}, "is empty"),
        ({"widths": (3, 2)}, r"widths \[3, 2\], accepted: ascending, of \[2, 3, 4\]"),
        ({"widths": (2, 5)}, r"widths \[2, 5\]"),
        ({"omega": {2: 1.0, 3: 0.0, 4: 1.0}}, "omega of width 3 is 0.0, accepted: above 0"),
        ({"omega": {2: 1.0}}, "omega of width 3 is None"),
        ({"effort": "more"}, "effort 'more', accepted: fast, balanced, best"),
        ({"damp": 0.0}, "damp 0.0, accepted: above 0"),
        ({"weight": 1e5 * torch.arange(256.0).view(4, 64)}, "does not fit float16"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"weight": layers.weight(4, 64), "hessian": torch.eye(64)}
    arguments.update(change)
    with pytest.raises(ValueError, match=message):
        solve(arguments.pop("weight"), arguments.pop("hessian"), **arguments)  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    weight, hessian = layers.weight(2, 64, 128), torch.stack([layers.hessian(128, "power")] * 2)
    cpu = solve(weight, hessian)
    gpu = solve(weight.cuda(), hessian.cuda())
    assert gpu.codes.is_cuda
    for bits in (2, 3, 4):
        torch.testing.assert_close(
            gpu.loss[bits].sum().cpu(), cpu.loss[bits].sum(), rtol=2e-2, atol=0
        )
