"""Published conversions built for a recipe's shares, on the same text, runtime and accounting.

Shapes: T tokens, E routed experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fissile.config import Recipe
from fissile.families.sizes import expert_sizes
from fissile.io.units import UnitStore
from fissile.refactor.calibrate import neurons
from fissile.refactor.convert import AnyPartition
from fissile.refactor.partition import Partition
from fissile.refactor.readme_router import overlap_targets, readme_targets
from fissile.refactor.rivals import (
    MarkerStatistics,
    ProfileStatistics,
    Rival,
    cmoe_layer,
    emoe_layer,
    expertweaver_layer,
)
from fissile.refactor.sample import ffn_inputs, pick_windows
from fissile.run.extraction import Calibrated

RIVALS = ("cmoe", "expertweaver", "emoe")
"""Methods that bring a layer-wise router of their own."""
_FINE = 64
"""Experts of ExpertWeaver and EMoE, where the width allows it."""


def rival_experts(
    given: Calibrated, recipe: Recipe, store: UnitStore
) -> tuple[list[AnyPartition], list[dict[str, Tensor]], dict[str, Any], int]:
    """Partitions, routers, entries of `config.routing` and top_k of a rival.

    Args:
        given: calibration.
        recipe: its `extract` section names the method, the share and CMoE's counts.
        store: units of the result.
    """
    settings, layers = recipe.extract, given.dense.num_layers
    top_k = settings.top_k
    if settings.method != "cmoe":
        top_k = max(1, round(settings.active_share * _fine_experts(given)))
    inputs: list[Tensor] | None = None
    windows = pick_windows(given.windows, recipe.route.fit_tokens)
    partitions: list[AnyPartition] = []
    selectors: list[dict[str, Tensor]] = []
    kind = "linear"
    for i in range(layers):
        if not store.has(name := f"rival_{i:03d}"):
            if inputs is None:
                inputs = ffn_inputs(given.dense, windows, recipe.calibrate.batch_tokens)
            made = _rival_layer(given, recipe, inputs[i], windows.ids_NS.shape[1], i, top_k)
            store.save(name, made.partition.state() | made.selector, {"kind": made.kind})
            given.progress("extract", i + 1, layers, settings.method)
        tensors, record = store.load(name)
        kind = record["kind"]
        selectors.append({k: v for k, v in tensors.items() if k.startswith("selector.")})
        partitions.append(Partition.from_state(tensors))
    routing: dict[str, Any] = {} if kind == "linear" else {"selector": kind}
    if "selector.balance" in selectors[0]:
        routing["selection_bias"] = True
    return partitions, selectors, routing, top_k


def _fine_experts(given: Calibrated) -> int:
    width = given.dense.config.intermediate_size
    return max(count for count in range(2, _FINE + 1) if width % count == 0)


def _rival_layer(
    given: Calibrated, recipe: Recipe, x_TD: Tensor, length: int, layer: int, top_k: int
) -> Rival:
    settings, seed = recipe.extract, recipe.seed * 1000 + layer
    mlp = given.dense.layer(layer).mlp.shared
    assert mlp is not None
    gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
    if settings.method == "cmoe":
        sizes = expert_sizes(
            len(gate), settings.num_experts, top_k, settings.active_share, settings.multiple
        )
        markers = MarkerStatistics(gate, up, mlp.act_fn, top=min(10, len(gate)))
        markers.add(x_TD)
        counts = {"shared_size": sizes.shared, "num_experts": sizes.num_experts}
        return cmoe_layer(markers, gate, up, **counts)
    experts = _fine_experts(given)
    if settings.method == "emoe":
        return emoe_layer(up, num_experts=experts, seed=seed)
    profiles = ProfileStatistics(gate, mlp.act_fn, -(-len(x_TD) // length))
    profiles.add(x_TD, torch.arange(len(x_TD)) // length)
    return expertweaver_layer(profiles, gate, num_experts=experts, active=top_k, seed=seed)


@torch.no_grad()
def overlap_targets_of(
    given: Calibrated, recipe: Recipe, partitions: Sequence[AnyPartition]
) -> Tensor:
    """What Read-ME's router is trained towards, (H, T, E)."""
    inputs = ffn_inputs(given.dense, given.windows, recipe.calibrate.batch_tokens)
    overlaps = []
    for i, (x_TD, partition) in enumerate(zip(inputs, partitions, strict=True)):
        layer = given.dense.layer(i)
        rows = [
            overlap_targets(neurons(layer, x.float()), partition)
            for x in x_TD.split(recipe.calibrate.batch_tokens)
        ]
        overlaps.append(torch.cat(rows))
    return readme_targets(torch.stack(overlaps), recipe.route.per_layer)
