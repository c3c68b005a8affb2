"""The dense model over calibration text, one layer at a time.

Two passes share one loop: the first gathers neuron statistics, the second, once the experts are
known, the oracle's norms and the moments of the layer-wise router.
Shapes: N windows, S tokens per window, T = N*S tokens, D model width, F FFN width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.io.units import UnitStore
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.routers_fissile import Route
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.domains import MembershipPartition
from fissile.refactor.layerwise import ranking_targets, ridge_selector
from fissile.refactor.moments import Moments
from fissile.refactor.oracle import ExpertNorms
from fissile.refactor.partition import Partition
from fissile.refactor.statistics import NeuronStatistics, column_norms
from fissile.refactor.training import Progress


@dataclass(frozen=True)
class Windows:
    """Calibration text as packed windows.

    Attributes:
        ids_NS: int64 token ids, no padding.
        domain_N: int64 label of each window.
        domains: names of the labels.
    """

    ids_NS: Tensor
    domain_N: Tensor
    domains: tuple[str, ...]

    def token_domains(self, part: slice) -> Tensor:
        """Label of every token of some windows, (T,)."""
        return self.domain_N[part].repeat_interleave(self.ids_NS.shape[1])

    def token_index(self, part: slice) -> Tensor:
        """Place of every token of some windows in the whole stream, (T,)."""
        tokens = self.ids_NS.shape[1]
        return torch.arange(part.start * tokens, part.stop * tokens)


Visit = Callable[[FissileDecoderLayer, Tensor, slice], Tensor]
"""Layer, MLP input (T, D) and windows to the MLP's output (T, D)."""


@torch.no_grad()
def run_layer(
    model: StreamedModel,
    layer: FissileDecoderLayer,
    hidden_NSD: Tensor,
    batch_tokens: int,
    visit: Visit,
) -> None:
    """Carry the residual stream through one layer, in place, letting `visit` compute its MLP."""
    for part in batches(hidden_NSD, batch_tokens):
        hidden = hidden_NSD[part]
        residual = layer.attend(hidden, model.context(hidden))
        y_TD = visit(layer, layer.mlp_input(residual).flatten(0, 1), part)
        hidden_NSD[part] = layer.combine(residual, y_TD.view_as(hidden))


def neurons(layer: FissileDecoderLayer, x_TD: Tensor) -> Tensor:
    """Activations of a dense layer's FFN, (T, F)."""
    assert layer.mlp.shared is not None
    return layer.mlp.shared.neurons(x_TD)


def down_weight(layer: FissileDecoderLayer) -> Tensor:
    """Down projection of a dense layer's FFN, (D, F)."""
    assert layer.mlp.shared is not None
    return layer.mlp.shared.down_proj.weight


def gather_statistics(
    model: StreamedModel,
    windows: Windows,
    *,
    batch_tokens: int,
    sketch_dim: int,
    seed: int,
    store: UnitStore | None = None,
    progress: Progress | None = None,
) -> Iterator[NeuronStatistics]:
    """First pass: yield the neuron statistics of every layer, in order.

    Args:
        model: a dense model.
        windows: calibration text.
        batch_tokens: tokens per forward pass.
        sketch_dim: width of the activation sketch.
        seed: of the sketch.
        store: finished layers are kept here and not computed again.
        progress: called as (stage, done, total, detail).
    """
    store = store or UnitStore()
    hidden_NSD = model.embed(windows.ids_NS)
    for i in range(model.num_layers):
        layer = model.layer(i)
        if store.has(unit := f"layer_{i:03d}"):
            run_layer(model, layer, hidden_NSD, batch_tokens, _dense)
            stats = NeuronStatistics.from_state(store.load(unit)[0])
        else:
            norms_F, domains = column_norms(down_weight(layer)), len(windows.domains)
            stats = NeuronStatistics(norms_F, domains=domains, sketch_dim=sketch_dim, seed=seed)

            def visit(
                layer: FissileDecoderLayer,
                x_TD: Tensor,
                part: slice,
                stats: NeuronStatistics = stats,
            ) -> Tensor:
                h_TF = neurons(layer, x_TD)
                stats.add(h_TF, windows.token_domains(part), windows.token_index(part))
                return torch.nn.functional.linear(h_TF, down_weight(layer))

            run_layer(model, layer, hidden_NSD, batch_tokens, visit)
            store.save(unit, stats.state())
        if progress is not None:
            progress("calibrate", i + 1, model.num_layers, f"{windows.ids_NS.numel()} tokens")
        yield stats


def _dense(layer: FissileDecoderLayer, x_TD: Tensor, _part: slice) -> Tensor:
    """The MLP of a dense layer, nothing measured."""
    return layer.mlp(x_TD)


def measure_oracle(
    model: StreamedModel,
    windows: Windows,
    partitions: Sequence[Partition | MembershipPartition],
    *,
    ridge: float,
    batch_tokens: int,
    path: StreamedModel | None = None,
    store: UnitStore | None = None,
    progress: Progress | None = None,
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Second pass: what the oracle would choose, and the layer-wise routers that come closest.

    Args:
        model: the dense model.
        windows: calibration text.
        partitions: experts of every layer.
        ridge: of the layer-wise routers, in units of the inputs' mean variance.
        batch_tokens: tokens per forward pass.
        path: the model on whose activations all is measured; default the dense one. With the
            converted model routers learn from what they will see (on-trajectory distillation).
        store: finished layers are kept here and not computed again.
        progress: called as (stage, done, total, detail).

    Returns:
        Norms of the experts' outputs (T, E) per layer, and per layer what `ridge_selector` gives.
    """
    store, walked = store or UnitStore(), path or model
    hidden_NSD, routes = walked.embed(windows.ids_NS), path_routes(walked, windows, batch_tokens)
    norms: list[Tensor] = []
    selectors: list[dict[str, Tensor]] = []
    for i, partition in enumerate(partitions):
        own, unit = model.layer(i), f"layer_{i:03d}"
        walk = _Walk(own, [routes[start][i] for start in sorted(routes)], path is None)
        if store.has(unit):
            selectors.append(store.load(unit)[0])
            norms.append(selectors[-1].pop("norms_TE"))
        else:
            walk.measure = OracleMeasure(down_weight(own), partition)
        layer = own if path is None else path.layer(i)
        run_layer(walked, layer, hidden_NSD, batch_tokens, walk)
        if walk.measure is not None:
            norms.append(walk.measure.norms_TE())
            selectors.append(ridge_selector(walk.measure.moments, ridge))
            store.save(unit, {"norms_TE": norms[-1], **selectors[-1]})
        if progress is not None:
            progress("route", i + 1, model.num_layers, "oracle")
    return norms, selectors


def path_routes(
    model: StreamedModel, windows: Windows, batch_tokens: int
) -> dict[int, list[Route | None]]:
    """A pre-gating router's routes of every batch of windows, by the batch's first window."""
    parts = batches(windows.ids_NS, batch_tokens)
    return {part.start: model.routes(windows.ids_NS[part]) for part in parts}


class _Walk:
    """Visit of a layer: measures its dense FFN on whatever input it gets, batch after batch."""

    def __init__(
        self, own: FissileDecoderLayer, routes: Sequence[Route | None], dense: bool
    ) -> None:
        self.own, self.dense = own, dense
        self.measure: OracleMeasure | None = None
        self._routes = iter(routes)

    def __call__(self, layer: FissileDecoderLayer, x_TD: Tensor, _part: slice) -> Tensor:
        route = next(self._routes)
        if not self.dense and self.measure is None:
            return layer.mlp(x_TD, route)
        h_TF = neurons(self.own, x_TD)
        if self.measure is not None:
            self.measure.add(x_TD, h_TF)
        if self.dense:
            return torch.nn.functional.linear(h_TF, down_weight(self.own))
        return layer.mlp(x_TD, route)


class OracleMeasure:
    """Collects the expert norms and the moments of the layer-wise router of one layer.

    Args:
        down_DF: weight of the down projection (D, F).
        partition: experts of the layer.

    Attributes:
        moments: of pairs (MLP input, ranking targets), for `ridge_selector`.
    """

    def __init__(self, down_DF: Tensor, partition: Partition | MembershipPartition) -> None:
        self._norms = ExpertNorms(down_DF, partition)
        self.moments = Moments(len(down_DF), partition.num_experts)
        self._rows: list[Tensor] = []

    def add(self, x_TD: Tensor, h_TF: Tensor) -> None:
        """Add tokens: inputs of the MLP (T, D) and neuron activations (T, F)."""
        self._rows.append(self._norms(h_TF))
        self.moments.add(x_TD, ranking_targets(self._rows[-1]))

    def norms_TE(self) -> Tensor:
        """Norms of the experts' outputs for all tokens so far, (T, E)."""
        return torch.cat(self._rows)
