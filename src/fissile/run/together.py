"""A run in several processes: the main one works, the others join it where work is shared.

Router training, recovery and quantization are shared; every other stage belongs to the main
process. The others wait for its call, read what it has left in the run folder, and work along; they
write nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fissile.errors import CorruptCheckpoint, UsageError

if TYPE_CHECKING:
    from fissile.config import Recipe
    from fissile.run.context import RunContext
    from fissile.workers import Workers


def follows() -> bool:
    """Whether this process is one of several and not the main one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def follow(workers: Workers, context_of: Callable[[], RunContext]) -> None:
    """Work along whenever the main process calls, until it says that the run is over.

    Args:
        workers: this process among the others.
        context_of: makes the context of the run that the main process has begun.
    """
    from fissile.run.context import stop_on_signals
    from fissile.run.stages import Stages

    # The main process decides where to stop; without it there is nothing left to wait for.
    with stop_on_signals(threading.Event()):
        while (task := workers.called()) is not None:
            Stages(context_of()).join(task)


def earlier_norms(recipe: Recipe) -> list[float] | None:
    """Gradient norms that `recover.norms_from` names, for the refined schedule.

    Raises:
        UsageError: the folder is no run folder whose training is finished.
    """
    # Every command asks `follows` when it starts: what that does not need is imported here.
    from fissile.io.units import UnitStore

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
