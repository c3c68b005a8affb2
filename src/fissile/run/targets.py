"""What the artifact of a recipe can be exported to, before there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fissile.config import Recipe
from fissile.export.dense import dense_problems
from fissile.export.hosts import HOSTS, Known, problems
from fissile.export.targets import SERVERS
from fissile.families.base import Family


def target_problems(recipe: Recipe, family: Family, config: dict[str, Any]) -> Iterator[str]:
    """Why the targets of a recipe cannot be written from its artifact, with the way out.

    Args:
        recipe: whose `export.targets` are meant.
        family: of the backbone.
        config: of the planned artifact.
    """
    routing = config.get("routing")
    if routing is not None and recipe.route.dynamic_k:
        config = {**config, "routing": {**routing, "threshold": [0.0]}}
    known = Known(
        constants=_has_constants(recipe, routing),
        selector_bias=recipe.route.kind == "layerwise" and _has_selector_bias(recipe),
    )
    for target in recipe.export.targets:
        if target in SERVERS:
            if recipe.extract.enabled or recipe.quantize.enabled:
                yield (
                    f"{target}: dense models with float weights only; export the source itself: "
                    f"fissile export MODEL --to {target}"
                )
        elif target in HOSTS:
            yield from problems(HOSTS[target], family, config, known)
        elif target == "dense" or routing is None or routing["kind"] == "static":
            yield from dense_problems(family, config, known.constants)
        else:
            readable = [host for host in HOSTS.values() if host.gguf is not None]
            found = [list(problems(host, family, config, known)) for host in readable]
            if all(found):
                yield "gguf: no class that llama.cpp reads holds it; " + "; ".join(
                    reason for reasons in found for reason in reasons
                )


def _has_selector_bias(recipe: Recipe) -> bool:
    """Whether layer-wise routers will have biases that differ between experts."""
    recover = recipe.recover
    learns = recover.train_router or recover.alternate.rounds > 0
    fitted = recipe.route.selector == "ridge" or recipe.route.balance_load
    return fitted or (recover.method != "none" and learns)


def _has_constants(recipe: Recipe, routing: dict[str, Any] | None) -> bool:
    """Whether FFNs of the artifact will have biases that are not zero."""
    if routing is None or not recipe.recover.constants:
        return False
    fitted = recipe.recover.refit or recipe.recover.method == "full"
    return bool(routing.get("shared_bias")) and (fitted or routing["kind"] == "static")
