"""The header comment of a shipped recipe: what a run needs on three machines, by the plan.

Everything comes from the config.json that the model's publisher states, so it can be made, and
checked, without the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fissile import families
from fissile.config import Recipe
from fissile.errors import RecipeError
from fissile.recipe_files import load_recipe, published_config
from fissile.run.costs import COSTS
from fissile.run.plan import Plan, plan_headers


@dataclass(frozen=True)
class Machine:
    """A machine that a header speaks of.

    Attributes:
        name: as the header has it.
        memory: bytes of a GPU; None for a processor, whose memory can be any.
        cores: processors that share the work.
        gflops: slowest and fastest plausible float32 rate of one of them, in products.
    """

    name: str
    memory: float | None
    cores: int
    gflops: tuple[float, float]


MACHINES = (
    Machine("CPU, 16 cores", None, 16, COSTS.gflops_core),
    Machine("GPU, 24 GB", 24e9, 1, (4_000.0, 30_000.0)),
    Machine("GPU, 80 GB", 80e9, 1, (8_000.0, 60_000.0)),
)
_FIRST = "# Estimates of `fissile plan` from the published config.json, until measured:"
_LAST = (
    "# This version uses a GPU in recover alone; lines for GPUs are all arithmetic at their rate."
)


def published_plan(
    recipe: Recipe, path: Path, out: Path | None = None, machine: Machine | None = None
) -> Plan:
    """Plan a recipe for the model it was written for, without the model.

    Args:
        recipe: what is asked for.
        path: file of the recipe; the published config.json lies beside it.
        out: run folder; its disk is checked when given.
        machine: estimate for this one; by default for the one at hand.

    Raises:
        RecipeError: it is for no particular model, or does not fit it.
        UnsupportedModel: the model is of no known family.
    """
    headers = families.promised_headers(path.parent, published_config(path))
    if machine is None:
        return plan_headers(recipe, headers, out)
    costs = replace(COSTS, gflops_core=machine.gflops)
    return plan_headers(recipe, headers, out, cores=machine.cores, costs=costs)


def header(path: Path) -> list[str]:
    """Lines of a recipe's header comment.

    Args:
        path: file of a recipe with a published config.json beside it.

    Raises:
        As `published_plan`.
    """
    recipe = load_recipe(path)
    plans = {machine: published_plan(recipe, path, machine=machine) for machine in MACHINES}
    plan = next(iter(plans.values()))
    scored = [stage for stage in plan.stages if stage.stage not in ("evaluate", "report")]
    most = max(scored, key=lambda stage: stage.peak)
    memory = f"{_size(plan.largest.peak)} in {plan.largest.stage}"
    if plan.largest.stage == "evaluate":
        memory += f" ({_size(most.peak)} up to verify, in {most.stage})"
    lines = [_FIRST, f"#   memory         {memory}", f"#   disk           {_size(plan.disk)}"]
    for machine, found in plans.items():
        fast, slow = (_time(seconds) for seconds in found.seconds)
        fit = ""
        if machine.memory is not None:
            short = [s.stage for s in found.stages if _on_device(s.memory) > machine.memory]
            fit = f", too small for {', '.join(short)}" if short else ", every stage fits"
        lines.append(f"#   {machine.name:<14} {fast} to {slow}{fit}")
    return [*lines, _LAST]


def with_header(path: Path) -> str:
    """Text of a recipe's file with its header comment as the plan has it now.

    Raises:
        RecipeError: the file cannot be read; and as `published_plan`.
    """
    try:
        old = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        raise RecipeError(f"{path}: cannot be read ({err})") from None
    if _FIRST in old and _LAST in old:
        first, last = old.index(_FIRST), old.index(_LAST)
        old = old[:first] + old[last + 1 :]
    return "\n".join([*header(path), *old]) + "\n"


def _on_device(memory: Mapping[str, int]) -> int:
    """Bytes beside the interpreter's, which stay outside of a GPU."""
    return sum(memory.values()) - memory.get("interpreter", 0)


def _size(count: float) -> str:
    """Bytes to two digits."""
    return f"{float(f'{count / 1e9:.2g}'):g} GB"


def _time(seconds: float) -> str:
    """Seconds to two digits."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < size * most:
            return f"{float(f'{seconds / size:.2g}'):g} {unit}"
    return f"{float(f'{seconds / 86400:.2g}'):g} days"
