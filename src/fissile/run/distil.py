"""Training of a pre-gating router in a run, by all of its processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fissile.config import Recipe
from fissile.io.units import UnitStore
from fissile.models.build import with_routing
from fissile.refactor.readme_router import distill_readme
from fissile.refactor.router import DistilledRouter, distill_router
from fissile.run.extraction import Calibrated

_UNIT = "router_lesson"


@dataclass(frozen=True, eq=False)
class RouterLesson:
    """What a router learns.

    Attributes:
        routing: of the converted model's configuration.
        targets_HTE: see `distill_router` and `distill_readme`.
        weights_H: say of every head in the loss, or None.
    """

    routing: dict[str, Any]
    targets_HTE: Tensor
    weights_H: Tensor | None = None


def distil(
    given: Calibrated, recipe: Recipe, lesson: RouterLesson, store: UnitStore
) -> DistilledRouter:
    """Train the router of a recipe; other processes of the run are called to it.

    Args:
        given: calibration.
        recipe: its `route` section and seed.
        lesson: what is learned.
        store: where the training can be resumed.
    """
    workers, settings = given.workers, recipe.route
    if workers.count > 1 and workers.main:
        tensors = {"targets": lesson.targets_HTE}
        if lesson.weights_H is not None:
            tensors["weights"] = lesson.weights_H
        store.save(_UNIT, tensors, {"routing": lesson.routing})
        task = {"store": str(store.folder), "recipe": recipe.model_dump(mode="json")}
        workers.call({"task": "route", **task})
    common: dict[str, Any] = {
        "seed": recipe.seed,
        "checkpoint": store.path("router_training"),
        "progress": given.progress,
        "workers": workers,
    }
    config = with_routing(given.dense.config, lesson.routing)
    what = (given.dense, config, given.windows.ids_NS, lesson.targets_HTE, settings)
    if settings.block == "readme":
        trained = distill_readme(*what, **common)
    else:
        trained = distill_router(*what, weights_H=lesson.weights_H, **common)
    if workers.main:
        store.discard(_UNIT)
    return trained


def distil_along(given: Calibrated, task: dict[str, Any]) -> None:
    """Take part in a training that the main process has called for.

    Args:
        given: calibration.
        task: its call.
    """
    store, recipe = UnitStore(Path(task["store"])), Recipe.model_validate(task["recipe"])
    tensors, record = store.load(_UNIT)
    lesson = RouterLesson(record["routing"], tensors["targets"], tensors.get("weights"))
    distil(given, recipe, lesson, store)
