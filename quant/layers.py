"""Quantize a model layer by layer on its own quantized path.

Linears that share an input are solved together. Each group's Hessian is measured after the groups
before it were replaced by their quantized weights, so later weights make up for earlier errors.
Shapes: N windows, S tokens per window, T tokens, D model width, O output rows, E routed experts,
M neurons per expert, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fissile.families.sizes import fitting_group
from fissile.io.units import UnitStore
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.modules_fissile import FissileExperts, GatedMLP, RoutedMLP
from fissile.models.routers_fissile import Route
from fissile.models.stream import StreamedModel, batches
from fissile.quant.hessian import HessianAccumulator, shrink
from fissile.quant.nested import NestedWeight

Solver = Callable[[Tensor, Tensor, int], NestedWeight]
"""Weight (..., O, I), Hessian (..., I, I) and group size to a nested weight."""

Progress = Callable[[str, int, int, str], None]

EXPERT_HESSIAN_BYTES = 1 << 30
"""Experts are solved in as many rounds as keep their Hessians below this."""


@dataclass
class QuantizedLayer:
    """What became of one layer.

    Attributes:
        parts: packed parts by name relative to the layer, "self_attn.q_proj.weight.plane_2" ...
        kept: tensors that stay in floating point.
        groups: weight name to group size.
        losses: weight name to width to relative loss, tr(dW H dW') / tr(W H W').
        events: ledger rows: kind, module, detail, value.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The part that is stored as JSON."""
        return {"groups": self.groups, "losses": self.losses, "events": self.events}


@torch.no_grad()
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
) -> Iterator[QuantizedLayer]:
    """Yield the layers of a quantized model, in order; later layers see earlier ones quantized.

    Args:
        model: float model, dense or routed.
        ids_NS: int64 calibration windows without padding.
        solver: how a weight becomes integers.
        group_size: inputs that share a scale and zero, reduced where it does not divide a width.
        attention: quantize attention projections too, not only FFNs.
        batch_tokens: tokens per forward pass.
        store: finished layers are kept here and not computed again.
        progress: called as (stage, done, total, detail).
    """
    store = store or UnitStore()
    hidden_NSD = model.embed(ids_NS)
    slices = list(batches(ids_NS, batch_tokens))
    routes = [model.routes(ids_NS[part]) for part in slices]
    for i in range(model.num_layers):
        layer = model.layer(i)
        worker = _LayerWorker(
            model, layer, hidden_NSD, slices, [r[i] for r in routes], solver, group_size
        )
        if store.has(unit := f"layer_{i:03d}"):
            worker.replay(read_layer(store, i))
        else:
            worker.quantize(attention)
            worker.result.kept = worker.rest()
            parts = {f"parts.{k}": v for k, v in worker.result.parts.items()}
            kept = {f"kept.{k}": v for k, v in worker.result.kept.items()}
            store.save(unit, {**parts, **kept}, worker.result.record())
        if progress is not None:
            progress("quantize", i + 1, model.num_layers, _summary(worker.result))
        yield worker.result


def read_layer(store: UnitStore, layer_idx: int) -> QuantizedLayer:
    """Read back a layer that `quantize_model` finished."""
    tensors, record = store.load(f"layer_{layer_idx:03d}")
    result = QuantizedLayer(groups=record["groups"], events=record["events"])
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


class _LayerWorker:
    """One layer while it is being quantized: the stream, the routes and the growing result."""

    def __init__(
        self,
        model: StreamedModel,
        layer: FissileDecoderLayer,
        hidden_NSD: Tensor,
        slices: list[slice],
        routes: list[Route | None],
        solver: Solver,
        group_size: int,
    ) -> None:
        self.model, self.layer, self.hidden_NSD = model, layer, hidden_NSD
        self.slices, self.routes, self.solver, self.group_size = slices, routes, solver, group_size
        self.result = QuantizedLayer()

    def quantize(self, attention: bool) -> None:
        if attention:
            for names in self.model.config.backbone["attention"]:
                self._attention_group(names)
        self._attend()
        mlp = self.layer.mlp
        self._gated(mlp.shared, "mlp.shared")
        self._gated(mlp.pool, "mlp.pool")
        if isinstance(mlp.experts, FissileExperts):
            for begin, end in self._expert_rounds(mlp.experts):
                self._expert_gate_up(mlp.experts, begin, end)
            self._expert_down(mlp.experts)
            self._join_experts()
        self._finish()

    def replay(self, result: QuantizedLayer) -> None:
        """Continue the stream through a layer that an earlier run finished."""
        self.result = result
        state = dict(self.result.kept)
        for name in self.result.groups:
            state[name] = decode(self.result.parts, name)
        self.layer.load_state_dict(state, assign=True)
        self._attend()
        self._finish()

    def rest(self) -> dict[str, Tensor]:
        """Tensors of the layer that were not quantized."""
        state = self.layer.state_dict()
        return {k: v for k, v in state.items() if k not in self.result.groups}

    # -- the stream ------------------------------------------------------------------------------

    def _attend(self) -> None:
        """Replace the stream by the residual after attention."""
        for part in self.slices:
            hidden = self.hidden_NSD[part]
            self.hidden_NSD[part] = self.layer.attend(hidden, self.model.context(hidden))

    def _finish(self) -> None:
        """Add the MLP's output to the stream."""
        for part, route in zip(self.slices, self.routes, strict=True):
            residual = self.hidden_NSD[part]
            y = self.layer.mlp(self.layer.mlp_input(residual), route)
            self.hidden_NSD[part] = self.layer.combine(residual, y)

    def _mlp_inputs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """MLP inputs (T, D) and chosen experts (T, K) of every batch."""
        mlp: RoutedMLP = self.layer.mlp
        for part, route in zip(self.slices, self.routes, strict=True):
            x_TD = self.layer.mlp_input(self.hidden_NSD[part]).flatten(0, 1)
            decided = mlp.decide(x_TD, route) if mlp.experts or mlp.pool else None
            # An expert below the threshold fills a slot with weight zero: it sees no token.
            yield x_TD, None if decided is None else decided[0].where(decided[1] != 0, -1)

    # -- groups of linears -----------------------------------------------------------------------

    def _attention_group(self, names: list[str]) -> None:
        linears = [getattr(self.layer.self_attn, name) for name in names]
        hessian = HessianAccumulator(linears[0].in_features)
        with _capture(linears[0], hessian):
            for part in self.slices:
                hidden = self.hidden_NSD[part]
                self.layer.attend(hidden, self.model.context(hidden))
        self._solve_linears([f"self_attn.{n}" for n in names], linears, hessian.finish()[0])

    def _gated(self, mlp: GatedMLP | None, prefix: str) -> None:
        """Gate and up of a shared or pooled FFN, then its down projection."""
        if mlp is None:
            return
        hessian = HessianAccumulator(mlp.gate_proj.in_features)
        for x_TD, _ in self._mlp_inputs():
            hessian.add(x_TD)
        pair = [mlp.gate_proj, mlp.up_proj]
        self._solve_linears([f"{prefix}.gate_proj", f"{prefix}.up_proj"], pair, hessian.finish()[0])
        hessian = HessianAccumulator(mlp.down_proj.in_features)
        with _capture(mlp.down_proj, hessian):
            for part, route in zip(self.slices, self.routes, strict=True):
                self.layer.mlp(self.layer.mlp_input(self.hidden_NSD[part]), route)
        self._solve_linears([f"{prefix}.down_proj"], [mlp.down_proj], hessian.finish()[0])

    def _solve_linears(self, names: list[str], linears: list[nn.Linear], hessian: Tensor) -> None:
        group = fitting_group(linears[0].in_features, self.group_size)
        if group is None:
            for name in names:
                self._keep(name, linears[0].in_features)
            return
        rows = [linear.out_features for linear in linears]
        weight_OI = torch.cat([linear.weight.float() for linear in linears])
        nested = self.solver(weight_OI, hessian, group)
        begin = 0
        for name, linear, count in zip(names, linears, rows, strict=True):
            piece = _rows(nested, begin, begin + count)
            self._store(f"{name}.weight", piece, linear.weight, hessian)
            linear.weight = _frozen(piece.dequantize(max(piece.widths)))
            begin += count

    def _store(self, name: str, nested: NestedWeight, weight: Tensor, hessian: Tensor) -> None:
        for suffix, part in nested.parts().items():
            self.result.parts[f"{name}.{suffix}"] = part
        self.result.groups[name] = nested.group_size
        self.result.losses[name] = relative_losses(nested, weight, hessian)

    def _keep(self, name: str, inputs: int) -> None:
        self.result.events.append(
            {
                "kind": "kept_float",
                "module": name,
                "detail": f"no group size divides {inputs} inputs",
                "value": float(inputs),
            }
        )

    # -- routed experts --------------------------------------------------------------------------

    def _expert_rounds(self, experts: FissileExperts) -> list[tuple[int, int]]:
        each = 8 * experts.hidden_dim**2
        size = max(1, EXPERT_HESSIAN_BYTES // each)
        return [
            (b, min(b + size, experts.num_experts)) for b in range(0, experts.num_experts, size)
        ]

    def _expert_gate_up(self, experts: FissileExperts, begin: int, end: int) -> None:
        name = "mlp.experts.gate_up_proj"
        group = fitting_group(experts.hidden_dim, self.group_size)
        if group is None:
            self._keep(name, experts.hidden_dim)
            return
        layer_wide = HessianAccumulator(experts.hidden_dim)
        routed = HessianAccumulator(experts.hidden_dim, (end - begin,))
        for x_TD, index_TK in self._mlp_inputs():
            assert index_TK is not None
            layer_wide.add(x_TD)
            inside = (index_TK >= begin) & (index_TK < end)
            routed.add(x_TD, torch.where(inside, index_TK - begin, -1))
        hessian, counts = routed.finish()
        self._starved(counts, begin, experts.hidden_dim)
        hessian = shrink(hessian, counts, layer_wide.finish()[0])
        weight = experts.gate_up_proj[begin:end].float()
        nested = self.solver(weight, hessian, group)
        self._store(f"{name}@{begin:04d}", nested, weight, hessian)
        stack = experts.gate_up_proj.clone()
        stack[begin:end] = nested.dequantize(max(nested.widths))
        experts.gate_up_proj = _frozen(stack)

    def _expert_down(self, experts: FissileExperts) -> None:
        name, size = "mlp.experts.down_proj", experts.intermediate_dim
        group = fitting_group(size, self.group_size)
        if group is None:
            self._keep(name, size)
            return
        every = HessianAccumulator(size, (experts.num_experts,))
        routed = HessianAccumulator(size, (experts.num_experts,))
        for x_TD, index_TK in self._mlp_inputs():
            assert index_TK is not None
            for e, gate_up in enumerate(experts.gate_up_proj):
                gate, up = nn.functional.linear(x_TD, gate_up).chunk(2, dim=-1)
                h_TM = experts.act_fn(gate) * up
                every.add(h_TM, torch.full((len(h_TM),), e))
                chosen = (index_TK == e).any(1)
                routed.add(h_TM[chosen], torch.full((int(chosen.sum()),), e))
        hessian, counts = routed.finish()
        hessian = shrink(hessian, counts, every.finish()[0])
        weight = experts.down_proj.float()
        nested = self.solver(weight, hessian, group)
        self._store(name, nested, weight, hessian)
        experts.down_proj = _frozen(nested.dequantize(max(nested.widths)))

    def _starved(self, counts: Tensor, begin: int, inputs: int) -> None:
        """Experts whose tokens cannot span their inputs rest on the layer's Hessian: say so."""
        for e, count in enumerate(counts.tolist()):
            if count < inputs:
                self.result.events.append(
                    {
                        "kind": "starved_expert",
                        "module": f"mlp.experts.{begin + e}",
                        "detail": f"{count} calibration tokens for {inputs} inputs",
                        "value": float(count),
                    }
                )

    def _join_experts(self) -> None:
        """Put the rounds of `_expert_gate_up` back into one stack."""
        name = "mlp.experts.gate_up_proj"
        pieces = sorted(k for k in self.result.groups if k.startswith(f"{name}@"))
        if not pieces:
            return
        suffixes = [
            k.removeprefix(f"{pieces[0]}.") for k in self.result.parts if k.startswith(pieces[0])
        ]
        for suffix in suffixes:
            stack = torch.cat([self.result.parts.pop(f"{piece}.{suffix}") for piece in pieces])
            self.result.parts[f"{name}.{suffix}"] = stack
        losses = [self.result.losses.pop(piece) for piece in pieces]
        self.result.losses[name] = {k: sum(x[k] for x in losses) / len(losses) for k in losses[0]}
        self.result.groups[name] = self.result.groups.pop(pieces[0])


def relative_losses(nested: NestedWeight, weight: Tensor, hessian: Tensor) -> dict[int, float]:
    """tr(dW H dW') / tr(W H W') for every width."""
    weight, hessian = weight.float(), hessian.float()
    total = float(((weight @ hessian) * weight).sum().clamp_min(1e-30))
    losses = {}
    for width in nested.widths:
        delta = nested.dequantize(width) - weight
        losses[width] = float(((delta @ hessian) * delta).sum()) / total
    return losses


def decode(parts: dict[str, Tensor], name: str, bits: int | None = None) -> Tensor:
    """Float32 weight `name` from packed parts, at `bits` or the widest width stored."""
    from fissile.kernels.layout import dequantize

    own = {k.removeprefix(f"{name}."): v for k, v in parts.items() if k.startswith(f"{name}.")}
    widths = [int(k.removeprefix("theta_")) for k in own if k.startswith("theta_")]
    return dequantize(own, max(widths) if bits is None else bits)


def _rows(nested: NestedWeight, begin: int, end: int) -> NestedWeight:
    return NestedWeight(
        nested.codes[begin:end],
        {k: v[begin:end] for k, v in nested.scale.items()},
        {k: v[begin:end] for k, v in nested.zero.items()},
        nested.widths,
        nested.group_size,
    )


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _capture(linear: nn.Linear, hessian: HessianAccumulator) -> Iterator[None]:
    """Feed every input of `linear` to an accumulator while the context is open."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hessian.add(args[0])

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
