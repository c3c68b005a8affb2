"""Quantize a model layer by layer on its own quantized path.

Linears that share an input are solved together. Each group's Hessian is measured after the groups
before it were replaced by their quantized weights, so later weights make up for earlier errors.
Shapes: N windows, S tokens per window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fissile.families.sizes import fitting_group
from fissile.io.units import UnitStore
from fissile.kernels.layout import dequantize
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.modules_fissile import FissileExperts, GatedMLP
from fissile.models.stream import StreamedModel
from fissile.quant.blocks import BlockData, BlockTrainer
from fissile.quant.nested import NestedWeight
from fissile.quant.sensitivity import sensitivity, sharing
from fissile.quant.solvers import Solver
from fissile.quant.streams import Streams
from fissile.quant.worker import LayerWork, LayerWorker
from fissile.workers import Workers

Progress = Callable[[str, int, int, str], None]


@dataclass
class QuantizedLayer:
    """What became of one layer.

    Attributes:
        parts: packed parts by name relative to the layer, "self_attn.q_proj.weight.plane_2" ...
        kept: tensors that stay in floating point.
        groups: weight name to group size.
        companding: weight name to the table of its values, where it is not 1.
        losses: weight name to width to relative loss, tr(dW H dW') / tr(W H W').
        events: ledger rows: kind, module, detail, value.
        block: relative error of the block on held-out windows by width, before and after each
            round of training; empty without a block stage.
        sensitivity: first of the weights that share a width, or one expert of them, to width to the
            block's relative error with these alone quantized; empty unless the solver asks for it.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    companding: dict[str, float] = field(default_factory=dict)
    block: list[list[dict[int, float]]] = field(default_factory=list)
    sensitivity: dict[str, dict[int, float]] = field(default_factory=dict)

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that are stored."""
        return _widths(name.rpartition(".")[2] for name in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        """The part that is stored as tensors."""
        parts = {f"parts.{k}": v for k, v in self.parts.items()}
        return parts | {f"kept.{k}": v for k, v in self.kept.items()}

    def record(self) -> dict[str, Any]:
        """The part that is stored as JSON."""
        return {
            "groups": self.groups,
            "losses": self.losses,
            "events": self.events,
            "companding": self.companding,
            "block": self.block,
            "sensitivity": self.sensitivity,
        }

    def decode(self, name: str, bits: int | None = None) -> Tensor:
        """Float32 weight `name` at `bits`, or at the widest width stored."""
        return decode(self.parts, name, bits, self.companding.get(name, 1.0))

    def nested(self, name: str) -> NestedWeight:
        """Weight `name` as codes and floats."""
        prefix, companding = f"{name}.", self.companding.get(name, 1.0)
        own = {k.removeprefix(prefix): v for k, v in self.parts.items() if k.startswith(prefix)}
        return NestedWeight.from_parts(own, self.groups[name], companding)


def quantize_model(
    model: StreamedModel,
    ids_NS: Tensor,
    solver: Solver,
    *,
    group_size: int,
    attention: bool,
    batch_tokens: int,
    store: UnitStore | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Iterator[QuantizedLayer]:
    """Yield the layers of a quantized model, in order; later layers see earlier ones quantized.

    Args:
        model: float model, dense or routed.
        ids_NS: int64 calibration windows without padding.
        solver: how a weight becomes integers, and whether blocks are trained in between.
        group_size: inputs that share a scale and zero, reduced where it does not divide a width.
        attention: quantize attention projections too, not only FFNs.
        batch_tokens: tokens per forward pass.
        store: finished layers are kept here and not computed again.
        progress: called as (stage, done, total, detail).
        workers: processes that call this together on one store, which the main one writes. Each
            takes its share of windows, rows and experts; the result is that of one process.
    """
    store, workers = store or UnitStore(), workers or Workers()
    trains = solver.block is not None and bool(solver.block.steps)
    beside = solver.drift or trains or solver.sensitivity
    # Without targets from the float model all widths calibrate on the widest one's path.
    widths = solver.widths if beside else solver.widths[-1:]
    kept_at: dict[str, Any] = {"floats": beside, "folder": store.folder, "workers": workers}
    streams = Streams(model, ids_NS, widths, batch_tokens, **kept_at)
    for i in range(model.num_layers):
        needed = beside or solver.residual
        layer, reference = model.layer(i), model.layer(i) if needed else None
        if workers.agreed(store.has(unit := f"layer_{i:03d}")):
            result = read_layer(store, i)
        else:
            names = planned_names(model, layer, group_size, attention)
            trainer = None
            if trains and solver.block is not None and reference is not None:
                data = _block_data(streams, reference, i, solver)
                args = (solver.block, solver.seed + i, solver.moving, workers)
                trainer = BlockTrainer(layer, names, data, *args)
            worker = LayerWorker(layer, i, reference, streams, solver, group_size, trainer)
            groups = model.config.backbone["attention"] if attention else []
            result = _packed(worker.quantize(groups), layer, trainer)
            if solver.sensitivity and reference is not None:
                shared = sharing(list(result.groups), model.config.backbone["attention"])
                widths_of = (*solver.widths, *solver.residual)
                result.sensitivity = sensitivity(
                    reference, shared, widths_of, result.decode, streams, i
                )
            if workers.main:
                store.save(unit, result.tensors(), result.record())
        _advance(streams, layer, reference, result, i)
        if progress is not None and workers.main:
            progress("quantize", i + 1, model.num_layers, _summary(result))
        yield result


def planned_names(
    model: StreamedModel, layer: FissileDecoderLayer, group_size: int, attention: bool
) -> list[str]:
    """Parameters of a layer that will be quantized."""
    names = []
    if attention:
        for group in model.config.backbone["attention"]:
            names += [f"self_attn.{name}.weight" for name in group]
    for part in ("shared", "pool"):
        if isinstance(getattr(layer.mlp, part), GatedMLP):
            kinds = ("gate_proj", "up_proj", "down_proj")
            names += [f"mlp.{part}.{kind}.weight" for kind in kinds]
    if isinstance(layer.mlp.experts, FissileExperts):
        names += ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    own = dict(layer.named_parameters())
    return [name for name in names if fitting_group(own[name].shape[-1], group_size)]


@torch.no_grad()
def _block_data(
    streams: Streams, reference: FissileDecoderLayer, layer_idx: int, solver: Solver
) -> BlockData:
    """What the block stage trains on: every width's stream, the float model's output."""
    assert streams.float_NSD is not None
    target_NSD = streams.empty()
    for part, (x, route) in zip(streams.own, streams.batches(None, layer_idx), strict=True):
        target_NSD[part] = reference(x, route, streams.context(x))
    streams.exchange(target_NSD)
    return BlockData(
        streams.hidden,
        target_NSD,
        lambda windows: streams.route_of(layer_idx, windows),
        streams.context,
    )


def _packed(
    work: LayerWork, layer: FissileDecoderLayer, trainer: BlockTrainer | None
) -> QuantizedLayer:
    result = QuantizedLayer(losses=work.losses, events=work.events)
    for name, nested in work.nested.items():
        for suffix, part in nested.parts().items():
            result.parts[f"{name}.{suffix}"] = part
        result.groups[name] = nested.group_size
        if nested.companding != 1:
            result.companding[name] = nested.companding
    state = layer.state_dict()
    result.kept = {k: v for k, v in state.items() if k not in result.groups}
    if trainer is not None:
        result.block = [[before, after] for before, after in trainer.curve]
    return result


@torch.no_grad()
def _advance(
    streams: Streams,
    layer: FissileDecoderLayer,
    reference: FissileDecoderLayer | None,
    result: QuantizedLayer,
    layer_idx: int,
) -> None:
    """Send every stream through the layer as it is stored at that width."""
    for bits in streams.hidden:
        state = dict(result.kept)
        for name in result.groups:
            state[name] = result.decode(name, bits)
        layer.load_state_dict(state, assign=True)
        streams.advance(layer, bits, layer_idx)
    if reference is not None and streams.float_NSD is not None:
        streams.advance(reference, None, layer_idx)


def tuned_unit(layer_idx: int) -> str:
    """Unit of a store that holds what of a layer has changed since it was solved."""
    return f"tuned_{layer_idx:03d}"


def final_layer(store: UnitStore, layer_idx: int) -> QuantizedLayer:
    """A layer as it goes into the artifact: as solved, with floats that were tuned since."""
    result = read_layer(store, layer_idx)
    if store.has(unit := tuned_unit(layer_idx)):
        for name, tensor in store.load(unit)[0].items():
            (result.parts if name in result.parts else result.kept)[name] = tensor
    return result


def read_layer(store: UnitStore, layer_idx: int) -> QuantizedLayer:
    """Read back a layer that `quantize_model` finished."""
    tensors, record = store.load(f"layer_{layer_idx:03d}")
    result = QuantizedLayer(groups=record["groups"], events=record["events"])
    result.companding = record["companding"]
    result.block = [
        [{int(width): error for width, error in errors.items()} for errors in round_]
        for round_ in record["block"]
    ]
    for name, errors in record["sensitivity"].items():
        result.sensitivity[name] = {int(width): error for width, error in errors.items()}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        getattr(result, kind)[rest] = tensor
    for name, losses in record["losses"].items():
        result.losses[name] = {int(width): value for width, value in losses.items()}
    return result


def _summary(result: QuantizedLayer) -> str:
    widths = sorted({int(k) for losses in result.losses.values() for k in losses})
    means = []
    for width in widths:
        values = [losses[width] for losses in result.losses.values()]
        means.append(f"{width}b {sum(values) / len(values):.4f}")
    return "relative loss " + " ".join(means)


def decode(
    parts: dict[str, Tensor], name: str, bits: int | None = None, companding: float = 1.0
) -> Tensor:
    """Float32 weight `name` from packed parts, at `bits` or the widest width stored."""
    own = {k.removeprefix(f"{name}."): v for k, v in parts.items() if k.startswith(f"{name}.")}
    return dequantize(own, _widths(own)[-1] if bits is None else bits, companding)


def _widths(suffixes: Iterable[str]) -> tuple[int, ...]:
    """Widths that have floats, or floats that are tied, among parts of weights."""
    pairs = {suffix.partition("_")[::2] for suffix in suffixes}
    return tuple(sorted({int(width) for kind, width in pairs if kind in ("theta", "tied")}))
