"""A run under `accelerate launch`: the main process works, the others join it for the training.

Every stage but the training belongs to the main process. The others wait for its word, read what it
has left in the run folder, and train along; they write nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fissile.config import Recipe
from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.units import UnitStore

if TYPE_CHECKING:
    from fissile.refactor.workers import Workers
    from fissile.run.context import RunContext


def follows() -> bool:
    """Whether this process is one of several and not the main one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def follow(context_of: Callable[[Workers], RunContext]) -> None:
    """Train along whenever the main process says so, until it says that the run is over.

    Args:
        context_of: makes the context of the run that the main process has begun.
    """
    from fissile.refactor.workers import join_workers
    from fissile.run.stages import Stages

    workers = join_workers()
    while workers.from_main(0.0):
        stages = Stages(context_of(workers))
        stages.train(stages.untrained, "recover")


def earlier_norms(recipe: Recipe) -> list[float] | None:
    """Gradient norms that `recover.norms_from` names, for the refined schedule.

    Raises:
        UsageError: the folder is no run folder whose training is finished.
    """
    wanted = recipe.recover
    if wanted.schedule != "refined" or wanted.norms_from is None:
        return None
    folder = Path(wanted.norms_from) / "journal" / "recover" / "model"
    if not (folder / "curve.safetensors").is_file():
        raise UsageError(f"recover.norms_from {wanted.norms_from}: no training was recorded there")
    tensors, _ = UnitStore(folder).load("curve")
    if "norms" not in tensors:
        raise CorruptCheckpoint(f"{folder}: the record of the training holds no gradient norms")
    return [float(norm) for norm in tensors["norms"]]
