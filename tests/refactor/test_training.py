"""The optimisation loop: resuming changes no bit, and a diverging run stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fissile.errors import CorruptCheckpoint, QualityGate
from fissile.refactor.training import TrainSettings, step_generator, train

SETTINGS = TrainSettings(steps=12, learning_rate=0.05, warmup=3, weight_decay=0.1)


def problem() -> tuple[dict[str, nn.Parameter], Callable[[int], Tensor]]:
    rng = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 4, generator=rng)
    weights = {
        "matrix": nn.Parameter(torch.zeros(6, 4)),
        "shift": nn.Parameter(torch.zeros(6)),
    }

    def loss(step: int) -> Tensor:
        x = torch.randn(32, 4, generator=step_generator(5, step))
        got = x @ weights["matrix"].T + weights["shift"]
        return (got - x @ truth.T - 1).square().mean()

    return weights, loss


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    calm, loss = problem()
    curve = train(calm, loss, SETTINGS)
    assert curve[-1] < 0.7 * curve[0]

    class Killed(RuntimeError):
        pass

    path = tmp_path / "state.safetensors"
    for stop in (5, 9, 99):
        # A new process begins with fresh weights; only the file carries over.
        rough, loss = problem()

        def watched(step: int, stop: int = stop, loss: Callable[[int], Tensor] = loss) -> Tensor:
            if step == stop:
                raise Killed
            return loss(step)

        try:
            resumed = train(rough, watched, SETTINGS, checkpoint=path, checkpoint_every=2)
        except Killed:
            continue
    assert resumed == curve
    assert all(torch.equal(calm[name], rough[name]) for name in calm)


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
