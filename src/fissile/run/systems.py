"""The controls as recipes: each is the user's own with another way to make or choose experts."""

from __future__ import annotations

from typing import Any

from fissile.config import Control, Extract, Recipe, Route

OVERRIDES = {
    "random": "random",
    "oracle": "oracle",
    "oracle_per_layer": "oracle",
    "oracle_layerwise": "oracle",
}
"""Controls that replace a router's choices, and by what."""

_PREGATE: dict[str, Any] = {"kind": "pregate", "per_layer": False, "block": "attention"}
_HEADS = _PREGATE | {"per_layer": True}
_ROUTES: dict[str, dict[str, Any]] = {
    "ridge": {"kind": "layerwise", "selector": "ridge"},
    "mean_gate": {"kind": "layerwise", "selector": "mean_gate"},
    "spectral": {"kind": "layerwise", "selector": "spectral"},
    "dynamic": {"kind": "layerwise", "selector": "ridge", "dynamic_k": True},
    "pregate": _PREGATE,
    "pregate_dynamic": _PREGATE | {"dynamic_k": True},
    "per_layer": _HEADS,
    "per_layer_dynamic": _HEADS | {"dynamic_k": True},
    "token": _PREGATE | {"block": "token"},
    "oracle_per_layer": _HEADS,
    "oracle_layerwise": {"kind": "layerwise", "selector": "ridge"},
    "readme": _PREGATE | {"block": "readme"},
    "cmoe": {"kind": "layerwise"},
    "expertweaver": {"kind": "layerwise"},
    "emoe": {"kind": "layerwise"},
}
_RIVALS = ("readme", "cmoe", "expertweaver", "emoe")
UNRECOVERED = (*_RIVALS, "random", "oracle_per_layer", "oracle_layerwise")
"""Controls that are measured as they are: rivals have no re-fit, and bounds need none."""


def as_control(recipe: Recipe, name: Control, share: float) -> Recipe:
    """The recipe whose model a control is, before overrides and at another active share.

    Args:
        recipe: the user's.
        name: of the control; "random" and "oracle" keep the recipe's own experts.
        share: active share.
    """
    extract: dict[str, Any] = {"active_share": share}
    route: dict[str, Any] = dict(_ROUTES.get(name, {}))
    if name in _RIVALS:
        extract |= {"method": name, "allocation": "uniform", "refine_rounds": 0}
    elif name == "static_uniform":
        extract["allocation"] = "uniform"
    if name == "readme":
        extract["top_k"] = 1
    elif name == "cmoe":
        # Its own counts: eight experts, of the active ones half are shared (S3A3E8 at 0.75).
        active = min(7, max(2, round(8 * share)))
        extract |= {"num_experts": 8 - active // 2, "top_k": active - active // 2}
    if recipe.route.kind == "static" and name in ("random", "oracle"):
        route = {"kind": "layerwise", "selector": "ridge"}
    if name in _ROUTES:
        # A control has the plain form of its router.
        route = {"dynamic_k": False, "balance_load": False, "on_trajectory": False} | route
    if name == router_name(recipe):
        route = {}
    return recipe.model_copy(
        update={
            "extract": Extract(**(recipe.extract.model_dump() | extract)),
            "route": Route(**(recipe.route.model_dump() | route)),
        }
    )


def router_name(recipe: Recipe) -> str:
    """Which control a recipe's own router is."""
    route = recipe.route
    if route.kind == "pregate":
        if route.block != "attention":
            return route.block
        name = "per_layer" if route.per_layer else "pregate"
        return f"{name}_dynamic" if route.dynamic_k else name
    if route.kind == "layerwise":
        return "dynamic" if route.dynamic_k and route.selector == "ridge" else route.selector
    return "static"


def expert_unit(recipe: Recipe, main: Recipe) -> str:
    """Unit of the journal in which a recipe's experts are kept; equal experts share one.

    Args:
        recipe: from `as_control`.
        main: the user's.
    """
    if _expert_key(recipe) == _expert_key(main):
        return "extract"
    method, sees, share, allocation = _expert_key(recipe)
    parts = [
        method,
        sees,
        f"{share:g}",
        "" if allocation == main.extract.allocation else allocation,
    ]
    return f"controls/{'-'.join(part for part in parts if part)}"


def router_unit(recipe: Recipe, main: Recipe) -> str:
    """Unit of the journal in which a recipe's routers are kept."""
    if _expert_key(recipe) == _expert_key(main) and recipe.route == main.route:
        return "route"
    return f"{expert_unit(recipe, main)}/{router_name(recipe)}"


def _expert_key(recipe: Recipe) -> tuple[str, str, float, str]:
    extract, route = recipe.extract, recipe.route
    sees = sees_of(route) if extract.method == "fissile" else ""
    return extract.method, sees, extract.active_share, extract.allocation


def sees_of(route: Route) -> str:
    """What the router will see when it chooses: experts are refined for that."""
    if route.kind == "pregate":
        return "pregate_per_layer" if route.per_layer else "pregate"
    return "layerwise" if route.kind == "layerwise" else "pregate"
