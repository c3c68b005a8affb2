"""Least-squares re-fit of down projections, layer by layer on the converted model's own path.

What routing leaves out is partly predictable from what is computed. The down projections of the
shared neurons and of the routed experts, and a constant per expert that stands for it where it is
not chosen, are moved together to carry that part. A layer's change is kept only if the error on
held-out windows falls.
Shapes: N windows, T tokens, D model width, F FFN width, S shared neurons, E routed experts,
M neurons per expert, P neurons of overlapping experts, K chosen per token, I regressors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fissile.io.units import UnitStore
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.modules_fissile import FissileExperts, RoutedMLP
from fissile.models.routers_fissile import Route
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.compensate import Correction, Kind, corrections, is_held_out
from fissile.refactor.moments import Moments
from fissile.refactor.training import Progress

Scope = Literal["shared", "all"]
"""Which down projections move: the always computed ones, or the routed experts' too."""

Target = Literal["layer", "stream"]
"""What a layer's FFN is fitted to: the dense FFN on the same input, or whatever brings the residual
stream back to the dense model's (full-precision-stream targets, as GPTAQ has them)."""


@dataclass(frozen=True)
class RefitLayer:
    """Outcome for one layer.

    Attributes:
        tensors: new weights, named relative to the layer's `mlp.`.
        error_before: mean squared distance to the target on held-out windows, no change.
        error_after: the same with the change that was kept.
        kind: "full", "constant" (bias only) or "none"; whichever has the least held-out error.
    """

    tensors: dict[str, Tensor]
    error_before: float
    error_after: float
    kind: Kind


class Regressors:
    """What a layer's output is linear in, given its choices: [shared | routed | chosen experts].

    Args:
        mlp: of a converted layer.
        scope: whether the routed neurons take part.
        restore: whether each expert's choice takes part, see `RoutedMLP.restore`.
    """

    def __init__(self, mlp: RoutedMLP, scope: Scope, restore: bool) -> None:
        self.mlp, self.routed = mlp, mlp.experts if mlp.experts is not None else mlp.pool
        shared = mlp.shared.down_proj.in_features if mlp.shared is not None else 0
        fit_routed = scope == "all" and self.routed is not None
        width = 0
        if fit_routed and isinstance(self.routed, FissileExperts):
            width = self.routed.num_experts * self.routed.intermediate_dim
        elif fit_routed and mlp.pool is not None:
            width = mlp.pool.down_proj.in_features
        experts = mlp.num_experts if restore and self.routed is not None else 0
        self.shared, self.width, self.experts = shared, width, experts
        self.constant = mlp.shared is not None and mlp.shared.down_proj.bias is not None

    @property
    def blocks(self) -> list[int]:
        """Sizes of the groups of one scale: neurons, and choices."""
        return [size for size in (self.shared + self.width, self.experts) if size]

    def __call__(self, x_TD: Tensor, route: Route | None) -> Tensor:
        """Regressors of T tokens, (T, I)."""
        parts = [self.mlp.shared.neurons(x_TD)] if self.mlp.shared is not None else []
        if route is not None and self.width:
            parts.append(self._routed(x_TD, route))
        if route is not None and self.experts:
            chosen_TE = x_TD.new_zeros(len(x_TD), self.experts)
            parts.append(chosen_TE.scatter_add(1, route[0], route[1].to(x_TD.dtype)))
        return torch.cat(parts, dim=1)

    def _routed(self, x_TD: Tensor, route: Route) -> Tensor:
        index_TK, weights_TK = route
        if self.mlp.pool is not None:
            return self.mlp.pool.kept(x_TD, index_TK, weights_TK)
        experts = self.routed
        assert isinstance(experts, FissileExperts)
        h_TEM = x_TD.new_zeros(len(x_TD), experts.num_experts, experts.intermediate_dim)
        for e in range(experts.num_experts):
            token, slot = torch.where((index_TK == e) & (weights_TK != 0))
            gate, up = nn.functional.linear(x_TD[token], experts.gate_up_proj[e]).chunk(2, dim=-1)
            h_TEM[token, e] = experts.act_fn(gate) * up * weights_TK[token, slot, None].to(up.dtype)
        return h_TEM.flatten(1)

    def tensors(self, change: Correction) -> dict[str, Tensor]:
        """The layer's new weights under a correction, named relative to `mlp.`, float32."""
        weight_DI = change.weight_DI
        if weight_DI is None:
            weight_DI = change.bias_D.new_zeros(len(change.bias_D), sum(self.blocks))
        delta_DI = weight_DI.float()
        shared_DS, routed_DW, chosen_DE = delta_DI.split(
            [self.shared, self.width, self.experts], dim=1
        )
        found: dict[str, Tensor] = {}
        if self.mlp.shared is not None:
            down = self.mlp.shared.down_proj
            found["shared.down_proj.weight"] = down.weight.detach() + shared_DS
            if self.constant:
                found["shared.down_proj.bias"] = down.bias.detach() + change.bias_D.float()
        if self.width and self.mlp.pool is not None:
            found["pool.down_proj.weight"] = self.mlp.pool.down_proj.weight.detach() + routed_DW
        elif self.width:
            assert isinstance(self.routed, FissileExperts)
            down_EDM = self.routed.down_proj.detach()
            by_expert_DEM = routed_DW.unflatten(1, (down_EDM.shape[0], down_EDM.shape[2]))
            found["experts.down_proj"] = down_EDM + by_expert_DEM.transpose(0, 1)
        if self.experts:
            found["restore"] = -chosen_DE.T.contiguous()
        return {name: tensor.contiguous() for name, tensor in found.items()}


@torch.no_grad()
def refit_layers(
    converted: StreamedModel,
    dense: StreamedModel,
    ids_NS: Tensor,
    *,
    batch_tokens: int,
    scope: Scope = "all",
    target: Target = "stream",
    restore: bool = True,
    prepare: Callable[[FissileDecoderLayer, int], None] | None = None,
    store: UnitStore | None = None,
    progress: Progress | None = None,
) -> list[RefitLayer]:
    """Fit every layer's down projections to the dense model.

    Args:
        converted: the routed (or pruned) model.
        dense: the model it came from.
        ids_NS: int64 calibration windows without padding.
        batch_tokens: tokens per forward pass.
        scope: which projections move.
        target: what they are fitted to; "stream" is "layer" in families that normalise the FFN's
            output, where the stream is not linear in it.
        restore: fit a constant per expert too; the caller's configuration then needs
            `routing["restore"]`. Without effect where nothing is routed.
        prepare: called with each layer of `converted` and its index, e.g. to install a control.
        store: finished layers are kept here and not computed again.
        progress: called as (stage, done, total, detail).
    """
    store = store or UnitStore()
    streams = _Streams(converted, dense, ids_NS, batch_tokens, target)
    results = []
    for i in range(converted.num_layers):
        layer = converted.layer(i)
        if prepare is not None:
            prepare(layer, i)
        regressors = Regressors(layer.mlp, scope, restore)
        if store.has(unit := f"layer_{i:03d}"):
            tensors, record = store.load(unit)
            result = RefitLayer(tensors, **record)
            streams.skip(i)
        else:
            # With fewer than eight windows none is held out, and the fitted ones decide.
            judge = any(is_held_out(n) for n in range(len(ids_NS)))
            result = _fit_layer(regressors, streams.batches(layer, i), judge)
            record = {k: getattr(result, k) for k in ("error_before", "error_after", "kind")}
            store.save(unit, result.tensors, record)
        apply_refit(layer, result)
        streams.advance(layer, i)
        results.append(result)
        if progress is not None:
            change = f"error {result.error_before:.3g} to {result.error_after:.3g}"
            progress("recover", i + 1, converted.num_layers, f"re-fit {result.kind}, {change}")
    return results


def apply_refit(layer: FissileDecoderLayer, result: RefitLayer) -> None:
    """Write a result into a layer."""
    for name, tensor in result.tensors.items():
        owner, _, leaf = f"mlp.{name}".rpartition(".")
        module = layer.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


class _Batch(NamedTuple):
    """Some windows at one layer: FFN inputs (T, D), choices, what is missing (T, D), held out?"""

    x_TD: Tensor
    route: Route | None
    residual_TD: Tensor
    held_T: Tensor


class _Streams:
    """The residual streams of the converted and of the dense model, side by side."""

    def __init__(
        self,
        converted: StreamedModel,
        dense: StreamedModel,
        ids_NS: Tensor,
        batch_tokens: int,
        target: Target,
    ) -> None:
        self.converted, self.dense, self.batch_tokens = converted, dense, batch_tokens
        self.hidden_NSD = converted.embed(ids_NS)
        self.routes = [converted.routes(ids_NS[p]) for p in batches(ids_NS, batch_tokens)]
        # Without the dense stream half of the attention is saved.
        linear = converted.config.backbone["norm_layout"] == "pre"
        self.dense_NSD = self.hidden_NSD.clone() if target == "stream" and linear else None

    def batches(self, layer: FissileDecoderLayer, index: int) -> Iterator[_Batch]:
        """What the fit of one layer sees; the dense stream moves on with it."""
        dense_layer = self.dense.layer(index)
        for part, route in zip(self._parts(), self.routes, strict=True):
            hidden = self.hidden_NSD[part]
            residual = layer.attend(hidden, self.converted.context(hidden))
            x_BSD = layer.mlp_input(residual)
            if self.dense_NSD is None:
                wanted = dense_layer.mlp(x_BSD)
            else:
                stream = self.dense_NSD[part]
                stream = dense_layer(stream, None, self.dense.context(stream))
                self.dense_NSD[part] = stream
                wanted = stream - residual
            x_TD = x_BSD.flatten(0, 1)
            chosen = layer.mlp.decide(x_TD, route[index]) if layer.mlp.routes else None
            missing = (wanted - layer.mlp(x_BSD, route[index])).flatten(0, 1)
            held_N = torch.tensor([is_held_out(n) for n in range(part.start, part.stop)])
            held_T = held_N.repeat_interleave(hidden.shape[1])
            yield _Batch(x_TD, chosen, missing, held_T)

    def skip(self, index: int) -> None:
        """Carry the dense stream through a layer whose fit is known already."""
        if self.dense_NSD is not None:
            layer = self.dense.layer(index)
            for part in self._parts():
                stream = self.dense_NSD[part]
                self.dense_NSD[part] = layer(stream, None, self.dense.context(stream))

    def advance(self, layer: FissileDecoderLayer, index: int) -> None:
        """Carry the converted stream through its (re-fitted) layer."""
        for part, route in zip(self._parts(), self.routes, strict=True):
            hidden = self.hidden_NSD[part]
            self.hidden_NSD[part] = layer(hidden, route[index], self.converted.context(hidden))

    def _parts(self) -> list[slice]:
        return list(batches(self.hidden_NSD, self.batch_tokens))


def _fit_layer(regressors: Regressors, seen: Iterable[_Batch], judge: bool) -> RefitLayer:
    """Fit on most windows, let the held-out ones decide; without `judge` all do both."""
    moments: Moments | None = None
    held: list[_Batch] = []
    for batch in seen:
        held_T = batch.held_T if judge else torch.ones_like(batch.held_T)
        held.append(_pick(batch, held_T))
        fit = _pick(batch, ~held_T if judge else held_T)
        if moments is None:
            moments = Moments(sum(regressors.blocks), batch.residual_TD.shape[1])
        moments.add(regressors(fit.x_TD, fit.route), fit.residual_TD)
    assert moments is not None
    options = corrections(moments, constant=regressors.constant, blocks=regressors.blocks)
    left = [0.0] * len(options)
    for batch in held:
        x_TI = regressors(batch.x_TD, batch.route)
        for i, option in enumerate(options):
            left[i] += option.left(x_TI, batch.residual_TD)
    tokens = sum(len(batch.x_TD) for batch in held)
    best = min(range(len(options)), key=left.__getitem__)
    return RefitLayer(
        regressors.tensors(options[best]), left[0] / tokens, left[best] / tokens, options[best].kind
    )


def _pick(batch: _Batch, rows_T: Tensor) -> _Batch:
    route = batch.route
    if route is not None:
        route = route[0][rows_T], route[1][rows_T]
    return _Batch(batch.x_TD[rows_T], route, batch.residual_TD[rows_T], batch.held_T[rows_T])
