"""One optimisation loop for everything that is trained: resumable, stateless in its data order.

What step t sees depends only on (seed, t), never on how often the run was interrupted, so a resumed
run ends in the same bytes as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fissile.errors import CorruptCheckpoint, QualityGate
from fissile.io.publish import atomic_write_bytes
from fissile.refactor.schedules import Schedule, learning_rate

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class TrainSettings:
    """How a set of parameters is trained.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak of the schedule.
        schedule: see `schedules.decay`.
        warmup: steps of linear warm-up, fewer where the run is shorter.
        weight_decay: of AdamW, on matrices only.
        clip: bound on the global gradient norm.
    """

    steps: int
    learning_rate: float
    schedule: Schedule = "rex"
    warmup: int = 10
    weight_decay: float = 0.0
    clip: float = 1.0


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
) -> list[float]:
    """Minimise `loss_of(step)` over the named parameters with AdamW.

    Args:
        parameters: what is trained, by name; updated in place.
        loss_of: step to scalar loss with gradients.
        settings: schedule and optimiser.
        checkpoint: file to continue from if it exists, rewritten every `checkpoint_every` steps.
        checkpoint_every: steps between two writes.
        progress: called as (stage, done, total, detail).
        stage: label for `progress`.

    Returns:
        Loss of every step, including those of the resumed part.

    Raises:
        QualityGate: the loss or a gradient is not finite.
        CorruptCheckpoint: the resume file belongs to other parameters.
    """
    names = sorted(parameters)
    decay = [parameters[n] for n in names if parameters[n].ndim > 1]
    plain = [parameters[n] for n in names if parameters[n].ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decay, "weight_decay": settings.weight_decay},
        {"params": plain},
    ]
    warmup = min(settings.warmup, settings.steps - 1)
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=0.0)
    losses = _resume(checkpoint, names, parameters, optimiser)
    for step in range(len(losses), settings.steps):
        peak, kind = settings.learning_rate, settings.schedule
        rate = learning_rate(step, settings.steps, peak=peak, kind=kind, warmup=warmup)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        loss = loss_of(step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([parameters[n] for n in names], settings.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise QualityGate(
                f"{stage}: loss {loss.item()} with gradient norm {norm.item()} at step {step}"
            )
        optimiser.step()
        losses.append(loss.item())
        if checkpoint is not None and (step + 1) % checkpoint_every == 0:
            _save(checkpoint, names, parameters, optimiser, losses)
        if progress is not None:
            progress(stage, step + 1, settings.steps, f"loss {losses[-1]:.4f}")
    return losses


def _save(
    path: Path,
    names: list[str],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name in names:
        state = optimiser.state[parameters[name]]
        tensors[f"value.{name}"] = parameters[name].detach()
        tensors[f"mean.{name}"] = state["exp_avg"]
        tensors[f"square.{name}"] = state["exp_avg_sq"]
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomic_write_bytes(path, save(contiguous))


def _resume(
    path: Path | None,
    names: list[str],
    parameters: Mapping[str, nn.Parameter],
    optimiser: torch.optim.Optimizer,
) -> list[float]:
    if path is None or not path.exists():
        return []
    with safe_open(path, framework="pt") as file, torch.no_grad():
        stored = {key.removeprefix("value.") for key in file.keys() if key.startswith("value.")}  # noqa: SIM118
        if stored != set(names):
            raise CorruptCheckpoint(f"{path}: holds other parameters than the ones being trained")
        losses = file.get_tensor("losses").tolist()
        for name in names:
            parameters[name].copy_(file.get_tensor(f"value.{name}"))
            optimiser.state[parameters[name]] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": file.get_tensor(f"mean.{name}"),
                "exp_avg_sq": file.get_tensor(f"square.{name}"),
            }
    return losses
