"""What the artifact of a run will consist of: exact bytes, and the sizes that costs depend on."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from fissile import families
from fissile.config import Quantize, Recipe
from fissile.errors import UsageError
from fissile.families.artifact import float_shapes, is_loaded, nested_parts
from fissile.families.base import Family
from fissile.families.names import attention_shapes
from fissile.families.sizes import ExpertSizes, expert_sizes, fitting_group
from fissile.families.table import ARTIFACT_TYPE
from fissile.quant.allocate import budget_bytes
from fissile.run.costs import Shape

_FLOAT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Sizes:
    """What the artifact will weigh.

    Attributes:
        stored: bytes of all its tensors.
        layers: bytes of those inside the layers.
        loaded: bytes that are read for each width; {0: stored} without nested weights.
        bits_per_weight: of the nested weights at each width, floats included.
        kept_float: linears that stay in floating point, with their input width.
        small_groups: linears with a smaller group size than asked for.
        weights: how many are quantized.
    """

    stored: int
    layers: int
    loaded: dict[int, int]
    bits_per_weight: dict[int, float]
    kept_float: dict[str, int]
    small_groups: dict[str, int]
    weights: int = 0


def artifact_sizes(recipe: Recipe, family: Family, config: dict[str, Any]) -> Sizes:
    """Exact bytes of an artifact's tensors.

    Args:
        recipe: its quantize and export sections are used.
        family: of the backbone.
        config: of the artifact; `nested` need not be set.
    """
    wanted, item = recipe.quantize, _FLOAT_BYTES[recipe.export.dtype]
    widths = wanted.widths if wanted.enabled else ()
    packed: dict[int, int] = {bits: 0 for bits in widths}
    kept, small = {}, {}
    stored = weights = floats = layers = 0
    for name, shape in float_shapes(family, config):
        nests = bool(widths) and _is_linear(name, wanted.attention)
        group = fitting_group(shape[-1], wanted.group_size) if nests else None
        if group is None:
            floats += item * prod(shape)
            layers += item * prod(shape) * name.startswith("model.layers.")
            if nests:
                kept[name] = shape[-1]
            continue
        if group != wanted.group_size:
            small[name] = group
        weights += prod(shape)
        for part, (dtype, size) in nested_parts(shape, widths, group, wanted.tied).items():
            count = prod(size) * (2 if dtype == "I16" else 1)
            stored += count
            layers += count
            for bits in widths:
                packed[bits] += count * is_loaded(part, bits, widths, wanted.tied)
    loaded = {bits: count + floats for bits, count in packed.items()}
    per_weight = {bits: 8 * count / weights for bits, count in packed.items() if weights}
    return Sizes(stored + floats, layers, loaded or {0: floats}, per_weight, kept, small, weights)


def check_budget(wanted: Quantize, sizes: Sizes) -> None:
    """Raise UsageError where the budget of mixed widths is unreadable or below the narrowest."""
    if not (wanted.enabled and wanted.budget):
        return
    allowed = budget_bytes(wanted.budget, sizes.weights)
    least = min(sizes.bits_per_weight.values(), default=0.0)
    if 8 * allowed < least * sizes.weights:
        raise UsageError(
            f"quantize.budget {wanted.budget}: the narrowest widths take {least:.2f} bits a weight,"
            f" {int(least * sizes.weights / 8)} bytes"
        )


def _is_linear(name: str, attention: bool) -> bool:
    if ".self_attn." in name:
        return attention and name.endswith("proj.weight")
    return any(part in name for part in (".mlp.shared.", ".mlp.pool.", ".mlp.experts.")) and (
        not name.endswith(".bias")
    )


def planned_experts(recipe: Recipe, ffn: int, share: float) -> ExpertSizes | None:
    """Division of a layer's neurons at an active share; None when nothing is extracted.

    Raises:
        RecipeError: no such division.
    """
    wanted = recipe.extract
    if not wanted.enabled:
        return None
    if recipe.route.kind == "static":
        shared = max(1, round(ffn * share / wanted.multiple)) * wanted.multiple
        return ExpertSizes(min(shared, ffn), 0, 0, min(shared, ffn) / ffn)
    return expert_sizes(ffn, wanted.num_experts, wanted.top_k, share, wanted.multiple)


def planned_config(
    recipe: Recipe, config: dict[str, Any], family: Family, experts: ExpertSizes | None
) -> dict[str, Any]:
    """As much of the artifact's config.json as decides names and shapes of its tensors."""
    layers = families.dims_of(family, config).layers
    planned = {
        **config,
        "model_type": ARTIFACT_TYPE,
        "backbone": {"family": family.name},
        "num_base_layers": layers,
        "nested": None,
        **families.routed_fields(family, config),
    }
    if experts is not None:
        pool = experts.num_experts * experts.expert
        planned["routing"] = {
            "kind": recipe.route.kind,
            "num_experts": experts.num_experts,
            "top_k": recipe.extract.top_k,
            "shared_sizes": [experts.shared] * layers,
            "expert_sizes": [experts.expert] * layers,
            "per_layer": recipe.route.per_layer,
            "layout": "membership" if recipe.extract.method == "readme" else "disjoint",
            "blocks": [[[pool, list(range(experts.num_experts))]]] * layers,
            "shared_bias": experts.shared > 0 and recipe.recover.constants,
            "router": recipe.route.router_sizes(),
        }
        if recipe.recover.refit and recipe.recover.restores and experts.shared:
            planned["routing"]["restore"] = True
        if recipe.route.balance_load:
            planned["routing"]["selection_bias"] = True
        if recipe.route.kind == "layerwise" and recipe.route.selector == "spectral":
            rank = min(recipe.route.selector_rank, experts.expert)
            planned["routing"] |= {"selector": "spectral", "selector_rank": rank}
    return planned


def planned_shape(
    family: Family,
    config: dict[str, Any],
    experts: ExpertSizes | None,
    sizes: Sizes,
    recipe: Recipe,
) -> Shape:
    """Sizes of the model and its artifact that costs depend on."""
    dims, routing = families.dims_of(family, config), config.get("routing")
    shared, expert, count = dims.ffn, 0, 0
    computed, widest = 1.0, None
    if experts is not None:
        shared, expert, count = experts.shared, experts.expert, experts.num_experts
    elif routing is not None:
        shared, count = max(routing["shared_sizes"]), routing["num_experts"]
        expert = max(routing["expert_sizes"]) if routing["layout"] == "disjoint" else 0
        if expert:
            computed = min(1.0, (shared + routing["top_k"] * expert) / dims.ffn)
            widest = max(shared, expert)
    return Shape(
        dims,
        family.sdpa,
        shared,
        expert,
        count if expert else 0,
        recipe.extract.top_k,
        tuple(attention_shapes(family, dims).values()),
        sizes.stored,
        sizes.layers // dims.layers,
        computed,
        widest,
    )
