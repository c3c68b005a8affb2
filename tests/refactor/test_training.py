"""The optimisation loop: resuming changes no bit, and a diverging run stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fissile.errors import CorruptCheckpoint, QualityGate
from fissile.refactor.schedules import refined_table
from fissile.refactor.training import TrainSettings, step_generator, train

SETTINGS = TrainSettings(steps=12, learning_rate=0.05, warmup=0.25, weight_decay=0.1)


def problem(rows: int = 32) -> tuple[dict[str, nn.Parameter], Callable[[int], Tensor]]:
    """Least squares; batch b holds `rows` rows of one endless stream."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 4, generator=rng)
    weights = {
        "matrix": nn.Parameter(torch.zeros(6, 4)),
        "shift": nn.Parameter(torch.zeros(6)),
        "idle": nn.Parameter(torch.ones(3)),
    }

    def loss(batch: int) -> Tensor:
        places = range(batch * rows, (batch + 1) * rows)
        x = torch.stack([torch.randn(4, generator=step_generator(5, p)) for p in places])
        got = x @ weights["matrix"].T + weights["shift"]
        return (got - x @ truth.T - 1).square().mean()

    return weights, loss


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, accumulate: int) -> None:
    settings = replace(SETTINGS, accumulate=accumulate)
    calm, loss = problem()
    curve = train(calm, loss, settings)
    assert curve.losses[-1] < 0.7 * curve.losses[0]

    class Killed(RuntimeError):
        pass

    path = tmp_path / "state.safetensors"
    for stop in (5, 9, 99):
        # A new process begins with fresh weights; only the file carries over.
        rough, loss = problem()

        def watched(batch: int, stop: int = stop, loss: Callable[[int], Tensor] = loss) -> Tensor:
            if batch == stop * accumulate:
                raise Killed
            return loss(batch)

        try:
            resumed = train(rough, watched, settings, checkpoint=path, checkpoint_every=2)
        except Killed:
            continue
    assert (resumed.losses, resumed.norms) == (curve.losses, curve.norms)
    assert all(torch.equal(calm[name], rough[name]) for name in calm)
    # The end is kept too, so that a finished run is not trained again.
    again, _ = problem()
    assert train(again, watched, settings, checkpoint=path).losses == curve.losses
    assert all(torch.equal(calm[name], again[name]) for name in calm)


def test_accumulated_steps_are_those_of_larger_batches() -> None:
    whole, loss = problem(rows=32)
    one = train(whole, loss, SETTINGS)
    parts, loss = problem(rows=8)
    four = train(parts, loss, replace(SETTINGS, accumulate=4))
    assert four.losses == pytest.approx(one.losses, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-5, atol=1e-6)


def test_recorded_norms_are_l1_norms_of_the_whole_gradient() -> None:
    weights, loss = problem()
    start = {name: p.detach().clone().requires_grad_(True) for name, p in weights.items()}
    curve = train(weights, loss, replace(SETTINGS, clip=1e-3))
    fresh, first = problem()
    first(0).backward()
    expected = sum(float(p.grad.abs().sum()) for p in fresh.values() if p.grad is not None)
    assert curve.norms[0] == pytest.approx(expected, rel=1e-6)
    # What no loss reaches stays where it was.
    assert torch.equal(weights["idle"], start["idle"])


def test_seconds_are_spent_over_all_parts_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    settings = replace(SETTINGS, steps=None, seconds=0.6)
    seen: list[float] = []

    def slow(loss: Callable[[int], Tensor], stop: int) -> Callable[[int], Tensor]:
        def waiting(batch: int) -> Tensor:
            if batch == stop:
                raise RuntimeError
            time.sleep(0.02)
            return loss(batch)

        return waiting

    weights, loss = problem()
    with pytest.raises(RuntimeError):
        train(weights, slow(loss, 10), settings, checkpoint=path, checkpoint_every=1)
    weights, loss = problem()
    began = time.monotonic()
    curve = train(
        weights,
        slow(loss, -1),
        settings,
        checkpoint=path,
        checkpoint_every=1,
        progress=lambda _s, _d, _t, _x: seen.append(time.monotonic()),
    )
    spent = time.monotonic() - began
    assert curve.seconds >= 0.6
    # Ten steps of 0.02 s had been paid before.
    assert spent < curve.seconds - 0.15
    assert len(curve.losses) == 10 + len(seen)


def test_the_rate_follows_the_table_of_a_refined_schedule() -> None:
    table = tuple(refined_table([3.0, 1.0, 2.0, 5.0, 4.0], smoothing=0.0))
    settings = TrainSettings(8, 0.5, schedule="refined", table=table, warmup=0.0)
    rates = [settings.rate(step, 0.0, 1 / 8) for step in range(8)]
    assert rates[0] == pytest.approx(0.5 * table[0])
    assert rates[4] == pytest.approx(0.5 * table[2])


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    weights, loss = problem()
    path = tmp_path / "state.safetensors"
    train(weights, loss, SETTINGS, checkpoint=path, checkpoint_every=2)
    with pytest.raises(CorruptCheckpoint, match="other parameters"):
        train({"matrix": weights["matrix"]}, loss, SETTINGS, checkpoint=path)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    weights, loss = problem()
    with pytest.raises(QualityGate, match="at step 4"):
        train(weights, lambda step: loss(step) / (0.0 if step == 4 else 1.0), SETTINGS)


def test_a_run_needs_one_budget() -> None:
    with pytest.raises(ValueError, match="steps or seconds"):
        TrainSettings(steps=None, learning_rate=0.1)
    with pytest.raises(ValueError, match="steps or seconds"):
        TrainSettings(steps=3, learning_rate=0.1, seconds=1.0)
