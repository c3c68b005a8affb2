"""One optimisation loop for everything that is trained: resumable, stateless in its data order.

What step t sees depends only on (seed, t), never on how often the run was interrupted, so a resumed
run ends in the same bytes as an undisturbed one. A budget of seconds is the exception: how many
steps it holds depends on the machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fissile.errors import CorruptCheckpoint, QualityGate
from fissile.io.publish import atomic_write_bytes
from fissile.refactor.schedules import Schedule, learning_rate
from fissile.refactor.sharding import is_cut, like, whole
from fissile.workers import Workers, gradients

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TrainSettings:
    """How a set of parameters is trained. Exactly one of `steps` and `seconds` is the budget.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak of the schedule.
        seconds: time of training, over all resumed parts of the run.
        schedule: see `schedules.decay`.
        warmup: share of the budget in which the rate rises.
        phi: see `schedules.decay`.
        table: see `schedules.refined_table`; of the refined schedule.
        accumulate: losses whose mean makes one step.
        weight_decay: of AdamW, on matrices only.
        clip: bound on the global gradient norm.
    """

    steps: int | None
    learning_rate: float
    seconds: float | None = None
    schedule: Schedule = "rex"
    warmup: float = 0.05
    phi: float = 1.0
    table: tuple[float, ...] | None = None
    accumulate: int = 1
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError(f"give steps or seconds, not {self.steps} and {self.seconds}")

    def share(self, steps: int, seconds: float) -> float:
        """Share of the budget that is spent after so many steps and seconds, at most 1."""
        if self.seconds is not None:
            return min(1.0, seconds / self.seconds)
        return steps / self.steps if self.steps else 1.0

    def rate(self, steps: int, seconds: float, stride: float) -> float:
        """Learning rate of the step that follows so many others; `stride` is its share."""
        return learning_rate(
            self.share(steps, seconds),
            peak=self.learning_rate,
            kind=self.schedule,
            warmup=self.warmup,
            stride=stride,
            phi=self.phi,
            table=self.table,
        )


@dataclass
class Curve:
    """What a training run was like.

    Attributes:
        losses: of every step, those of resumed parts included.
        norms: L1 norm of every step's gradient, before clipping; see `schedules.refined_table`.
        seconds: time spent in steps.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on nothing but the seed and the step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def train(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int], Tensor],
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    progress: Progress | None = None,
    stage: str = "train",
    workers: Workers | None = None,
) -> Curve:
    """Minimise a loss over the named parameters with AdamW.

    Args:
        parameters: what is trained, by name; updated in place.
        loss_of: number of a batch to its scalar loss with gradients. Step t takes the mean over the
            batches t*A .. t*A+A-1, A being `settings.accumulate`.
        settings: budget, schedule and optimiser.
        checkpoint: file to continue from if it exists, rewritten every `checkpoint_every` steps and
            at the end.
        checkpoint_every: steps between two writes.
        progress: called as (stage, done, total, detail), in steps or whole seconds.
        stage: label for `progress`.
        workers: processes that each call this with their part of every batch; gradients and losses
            are averaged.

    Raises:
        QualityGate: the loss or a gradient is not finite.
        CorruptCheckpoint: the resume file belongs to other parameters.
    """
    workers = workers or Workers()
    optimiser = _optimiser(parameters, settings)
    curve = _resume(checkpoint, parameters, optimiser)
    began = time.monotonic() - curve.seconds
    while (share := settings.share(len(curve.losses), curve.seconds)) < 1:
        step = len(curve.losses)
        loss = _gradients(parameters, loss_of, step, settings.accumulate, workers)
        spent = workers.from_main(time.monotonic() - began)
        stride = settings.share(step + 1, spent) - share
        for group in optimiser.param_groups:
            group["lr"] = settings.rate(step, curve.seconds, stride)
        length, norm = _clip(parameters, settings.clip)
        if not (math.isfinite(loss) and math.isfinite(length)):
            raise QualityGate(f"{stage}: loss {loss} with gradient norm {length} at step {step}")
        optimiser.step()
        curve.losses.append(loss)
        curve.norms.append(norm)
        curve.seconds = workers.from_main(time.monotonic() - began)
        done = settings.share(step + 1, curve.seconds)
        due = (step + 1) % checkpoint_every == 0 or done == 1
        if checkpoint is not None and due:
            _save(checkpoint, parameters, optimiser, curve, workers)
        if progress is not None and workers.main:
            total = settings.steps or round(settings.seconds or 0)
            progress(stage, round(done * total), total, f"loss {loss:.4f}")
    return curve


def _optimiser(
    parameters: Mapping[str, nn.Parameter], settings: TrainSettings
) -> torch.optim.Optimizer:
    ordered = [parameters[name] for name in sorted(parameters)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in ordered if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in ordered if p.ndim <= 1]},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0, fused=True)


def _gradients(
    parameters: Mapping[str, nn.Parameter],
    loss_of: Callable[[int], Tensor],
    step: int,
    accumulate: int,
    workers: Workers,
) -> float:
    """Leave the step's gradient in the parameters; the mean loss over batches and processes."""
    ordered = [parameters[name] for name in sorted(parameters)]
    for parameter in ordered:
        parameter.grad = None
    total = torch.zeros(1, dtype=torch.float64)
    for batch in range(step * accumulate, (step + 1) * accumulate):
        loss = loss_of(batch) / accumulate
        loss.backward()
        total += loss.detach().double().cpu()
    found = zip(ordered, gradients(ordered), strict=True)
    # What is cut over the processes has been averaged on its way.
    workers.mean_([gradient for parameter, gradient in found if not is_cut(parameter)])
    shared = total.to(workers.device)
    workers.mean_([shared])
    return float(shared)


def _clip(parameters: Mapping[str, nn.Parameter], bound: float) -> tuple[float, float]:
    """Clip the global L2 norm of the gradient; its L2 and L1 norms before that."""
    found = gradients(parameters.values())
    norm = sum(float(whole(torch.linalg.vector_norm(grad.float(), 1))) for grad in found)
    return float(whole(nn.utils.clip_grad_norm_(list(parameters.values()), bound))), norm


def _save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    curve: Curve,
    workers: Workers,
) -> None:
    """Write the state; all processes call it, since each may hold a part."""
    tensors = {
        "losses": torch.tensor(curve.losses, dtype=torch.float64),
        "norms": torch.tensor(curve.norms, dtype=torch.float64),
        "seconds": torch.tensor(curve.seconds, dtype=torch.float64),
    }
    for name, parameter in parameters.items():
        state = optimiser.state[parameter]
        moments = {"mean": state["exp_avg"], "square": state["exp_avg_sq"]}
        for kind, tensor in {"value": parameter.detach(), **moments}.items():
            full = whole(tensor)
            if workers.main:
                tensors[f"{kind}.{name}"] = full.cpu().contiguous()
    if workers.main:
        atomic_write_bytes(path, save(tensors))


def _resume(
    path: Path | None, parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> Curve:
    if path is None or not path.exists():
        return Curve()
    with safe_open(path, framework="pt") as file, torch.no_grad():
        stored = {key.removeprefix("value.") for key in file.keys() if key.startswith("value.")}  # noqa: SIM118
        if stored != set(parameters):
            raise CorruptCheckpoint(f"{path}: holds other parameters than the ones being trained")
        losses, norms = (file.get_tensor(key).tolist() for key in ("losses", "norms"))
        for name, parameter in parameters.items():
            parameter.copy_(like(file.get_tensor(f"value.{name}"), parameter))
            moments = {"exp_avg": f"mean.{name}", "exp_avg_sq": f"square.{name}"}
            optimiser.state[parameter] = {
                "step": torch.tensor(float(len(losses)), device=parameter.device),
                **{k: like(file.get_tensor(v), parameter) for k, v in moments.items()},
            }
        return Curve(losses, norms, float(file.get_tensor("seconds")))
