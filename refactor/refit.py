"""Least-squares re-fit of the always-on down projection, layer by layer on the model's own path.

What routing leaves out is partly predictable from what is always computed; the shared projection is
moved to carry that part. A layer's change is kept only if the error on held-out windows falls.
Shapes: N windows, S tokens per window, T tokens, D model width, F shared neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.io.units import UnitStore
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.compensate import Refit, is_held_out, refit_shared
from fissile.refactor.moments import Moments
from fissile.refactor.training import Progress

RIDGE = 1e-2
"""Of the fit, in units of the mean variance of the shared neurons."""


@dataclass(frozen=True)
class RefitLayer:
    """Outcome for one layer.

    Attributes:
        weight_DF: new down projection of the shared neurons.
        bias_D: its bias.
        error_before: mean squared output error on held-out windows, no change.
        error_after: the same with the change that was kept.
        kind: "full", "constant" (bias only) or "none"; whichever has the least held-out error.
    """

    weight_DF: Tensor
    bias_D: Tensor
    error_before: float
    error_after: float
    kind: str


@torch.no_grad()
def refit_layers(
    converted: StreamedModel,
    dense: StreamedModel,
    ids_NS: Tensor,
    *,
    batch_tokens: int,
    prepare: Callable[[FissileDecoderLayer, int], None] | None = None,
    store: UnitStore | None = None,
    progress: Progress | None = None,
) -> list[RefitLayer]:
    """Fit every layer's shared down projection to what the dense FFN computes on the same input.

    Args:
        converted: the routed (or pruned) model.
        dense: the model it came from.
        ids_NS: int64 calibration windows without padding.
        batch_tokens: tokens per forward pass.
        prepare: called with each layer of `converted` and its index, e.g. to install a control.
        store: finished layers are kept here and not computed again.
        progress: called as (stage, done, total, detail).
    """
    store = store or UnitStore()
    hidden_NSD = converted.embed(ids_NS)
    routes = [converted.routes(hidden_NSD[p]) for p in batches(ids_NS, batch_tokens)]
    results = []
    for i in range(converted.num_layers):
        layer = converted.layer(i)
        if prepare is not None:
            prepare(layer, i)
        if store.has(unit := f"layer_{i:03d}"):
            tensors, record = store.load(unit)
            result = RefitLayer(tensors["weight"], tensors["bias"], **record)
        else:
            result = _fit_layer(
                converted, layer, dense.layer(i), hidden_NSD, routes, i, batch_tokens
            )
            record = {k: getattr(result, k) for k in ("error_before", "error_after", "kind")}
            store.save(unit, {"weight": result.weight_DF, "bias": result.bias_D}, record)
        apply_refit(layer, result)
        _advance(converted, layer, hidden_NSD, routes, i, batch_tokens)
        results.append(result)
        if progress is not None:
            change = f"error {result.error_before:.3g} to {result.error_after:.3g}"
            progress("recover", i + 1, converted.num_layers, f"re-fit {result.kind}, {change}")
    return results


def apply_refit(layer: FissileDecoderLayer, result: RefitLayer) -> None:
    """Write a result into a layer's shared down projection."""
    assert layer.mlp.shared is not None
    projection = layer.mlp.shared.down_proj
    projection.weight.data, projection.bias.data = result.weight_DF, result.bias_D


def _fit_layer(
    converted: StreamedModel,
    layer: FissileDecoderLayer,
    dense_layer: FissileDecoderLayer,
    hidden_NSD: Tensor,
    routes: list[list[tuple[Tensor, Tensor] | None]],
    index: int,
    batch_tokens: int,
) -> RefitLayer:
    shared = layer.mlp.shared
    assert shared is not None
    sizes = shared.down_proj.in_features, shared.down_proj.out_features
    fit, judge = Moments(*sizes), Moments(*sizes)
    for part, route in zip(batches(hidden_NSD, batch_tokens), routes, strict=True):
        hidden = hidden_NSD[part]
        x = layer.mlp_input(layer.attend(hidden, converted.context(hidden)))
        residual = dense_layer.mlp(x) - layer.mlp(x, route[index])
        h = shared.neurons(x)
        held = torch.tensor([is_held_out(window) for window in range(part.start, part.stop)])
        fit.add(h[~held].flatten(0, 1), residual[~held].flatten(0, 1))
        judge.add(h[held].flatten(0, 1), residual[held].flatten(0, 1))
    solution: Refit = refit_shared(fit, judge if judge.count else fit, ridge=RIDGE)
    weight = shared.down_proj.weight + solution.delta_DS.float()
    bias = shared.down_proj.bias + solution.bias_D.float()
    before, after = solution.error_before, solution.error_after
    return RefitLayer(weight.detach(), bias.detach(), before, after, solution.kind)


def _advance(
    model: StreamedModel,
    layer: FissileDecoderLayer,
    hidden_NSD: Tensor,
    routes: list[list[tuple[Tensor, Tensor] | None]],
    index: int,
    batch_tokens: int,
) -> None:
    for part, route in zip(batches(hidden_NSD, batch_tokens), routes, strict=True):
        hidden = hidden_NSD[part]
        hidden_NSD[part] = layer(hidden, route[index], model.context(hidden))
