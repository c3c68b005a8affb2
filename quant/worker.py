"""One layer while it is being quantized.

Linears that share an input are solved together, on inputs that have gone through the groups before
them as these will be stored; with a block stage, the weights of later groups are trained to make up
for earlier ones in between.

Shapes: N windows, S tokens per window, T tokens, D model width, I inputs, O output rows, E routed
experts, M neurons per expert, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fissile.families.sizes import fitting_group
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.modules_fissile import FissileExperts, GatedMLP, RoutedMLP
from fissile.models.routers_fissile import Route
from fissile.quant.blocks import BlockTrainer
from fissile.quant.hessian import Measured, Moments, shrunk
from fissile.quant.nested import NestedWeight, joined
from fissile.quant.shared import relative_losses, solve_shared
from fissile.quant.solvers import Evidence, Solver
from fissile.quant.streams import Streams

EXPERT_HESSIAN_BYTES = 1 << 30
"""Experts are solved in as many rounds as keep their Hessians below this."""

Tap = Callable[[FissileDecoderLayer, Tensor, Route | None], Tensor]
"""A layer, its input and route to the inputs (T, I) of one of its linears."""


@dataclass
class LayerWork:
    """What the quantization of a layer leaves.

    Attributes:
        nested: quantized weights by parameter name.
        losses: weight name to width to relative loss, tr(dW H dW') / tr(W H W').
        events: ledger rows: kind, module, detail, value.
    """

    nested: dict[str, NestedWeight] = field(default_factory=dict)
    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)


class LayerWorker:
    """Quantizes one layer.

    Args:
        layer: float layer; its parameters are replaced.
        layer_idx: its index.
        reference: the same layer, which stays; None where no targets are taken from it.
        streams: what enters the layer; not changed.
        solver: how a weight becomes integers.
        group_size: inputs that share a scale and zero, reduced where it does not divide a width.
        trainer: of the block stage, or None.
    """

    def __init__(
        self,
        layer: FissileDecoderLayer,
        layer_idx: int,
        reference: FissileDecoderLayer | None,
        streams: Streams,
        solver: Solver,
        group_size: int,
        trainer: BlockTrainer | None,
    ) -> None:
        self.layer, self.layer_idx, self.reference = layer, layer_idx, reference
        self.streams, self.solver, self.group_size = streams, solver, group_size
        self.trainer, self.work = trainer, LayerWork()
        self._parameters = dict(layer.named_parameters())
        if trainer is not None:
            self._take_free(trainer, solver.widths[-1])
        self._originals = dict(reference.named_parameters()) if reference is not None else {}

    def quantize(self, attention: list[list[str]]) -> LayerWork:
        """Solve all linears of the layer; `attention` lists those of attention by shared input."""
        for names in attention:
            self._linears("self_attn", names, self._into(f"self_attn.{names[0]}"))
        mlp = self.layer.mlp
        for name in ("shared", "pool"):
            if isinstance(getattr(mlp, name), GatedMLP):
                self._linears(f"mlp.{name}", ["gate_proj", "up_proj"], self._into_mlp)
                self._linears(f"mlp.{name}", ["down_proj"], self._into(f"mlp.{name}.down_proj"))
        if isinstance(mlp.experts, FissileExperts):
            self._gate_up()
            self._down()
        return self.work

    def install(self, bits: int) -> None:
        """Put what is solved so far into the layer, at one width."""
        for name, nested in self.work.nested.items():
            self._parameters[name].data = nested.dequantize(bits)
        if self.trainer is not None:
            self._take_free(self.trainer, bits)

    # -- inputs of linears -----------------------------------------------------------------------

    def _into(self, name: str) -> Tap:
        """Inputs of the linear `name`."""

        def tap(layer: FissileDecoderLayer, x_BSD: Tensor, route: Route | None) -> Tensor:
            seen: list[Tensor] = []
            handle = layer.get_submodule(name).register_forward_pre_hook(
                lambda _module, args: seen.append(args[0])
            )
            try:
                residual = layer.attend(x_BSD, self.streams.context(x_BSD))
                if not seen:
                    layer.mlp(layer.mlp_input(residual), route)
            finally:
                handle.remove()
            return seen[0].flatten(0, -2)

        return tap

    def _into_mlp(self, layer: FissileDecoderLayer, x_BSD: Tensor, route: Route | None) -> Tensor:
        residual = layer.attend(x_BSD, self.streams.context(x_BSD))
        return layer.mlp_input(residual).flatten(0, 1)

    @torch.no_grad()
    def _inputs(self, bits: int, tap: Tap) -> Iterator[tuple[Tensor, Tensor | None, Route | None]]:
        """Inputs (T, I) of a linear on one stream, the float model's, and the routes, by batch."""
        self.install(bits)
        own = self.streams.batches(bits, self.layer_idx)
        if self.reference is None or not self.solver.drift:
            for x_BSD, route in own:
                yield tap(self.layer, x_BSD, route), None, route
            return
        beside = self.streams.batches(None, self.layer_idx)
        for (x_BSD, route), (y_BSD, _) in zip(own, beside, strict=True):
            yield tap(self.layer, x_BSD, route), tap(self.reference, y_BSD, route), route

    def _chosen(self, x_TD: Tensor, route: Route | None) -> Tensor:
        """Chosen experts (T, K) for inputs of the MLP; -1 where none is computed."""
        mlp: RoutedMLP = self.layer.mlp
        decided = mlp.decide(x_TD, route)
        assert decided is not None
        # An expert below the threshold fills a slot with weight zero: it sees no token.
        return decided[0].where(decided[1] != 0, -1)

    # -- linears ---------------------------------------------------------------------------------

    def _linears(self, prefix: str, names: list[str], tap: Tap) -> None:
        """Solve linears with a shared input together."""
        paths = [f"{prefix}.{name}.weight" for name in names]
        inputs = self._parameters[paths[0]].shape[1]
        group = self._group(paths, inputs)
        if group is None:
            return

        def measure(bits: int) -> Measured:
            moments = Moments(inputs, drift=self.solver.drift)
            for x_TI, y_TI, _ in self._inputs(bits, tap):
                moments.add(x_TI, y_TI)
            return moments.finish(self.streams.workers)

        evidence, _ = self._evidence(measure)
        rows = [self._parameters[path].shape[0] for path in paths]
        weight = torch.cat([self._weight(path) for path in paths], dim=-2)
        original_OI = weight if weight.dim() == 2 else weight[-1]
        if self.solver.residual:
            original_OI = torch.cat([self._originals[path].float() for path in paths])
        nested, table_WO = solve_shared(
            self.solver, weight, original_OI, evidence, group, self.streams.workers
        )
        losses = [relative_losses(self.solver.widths, part) for part in table_WO.split(rows, dim=1)]
        for path, part, loss in zip(paths, nested.split(rows), losses, strict=True):
            self._solved(path, part, loss)
        self._train()

    def _group(self, names: list[str], inputs: int) -> int | None:
        group = fitting_group(inputs, self.group_size)
        if group is None:
            for name in names:
                event = {
                    "kind": "kept_float",
                    "module": name.removesuffix(".weight"),
                    "detail": f"no group size divides {inputs} inputs",
                    "value": float(inputs),
                }
                self.work.events.append(event)
        return group

    def _solved(self, name: str, nested: NestedWeight, losses: dict[int, float]) -> None:
        self.work.nested[name], self.work.losses[name] = nested, losses
        if self.trainer is not None:
            self.trainer.fix(name, nested)
        self._parameters[name].data = nested.dequantize(self.solver.widths[-1])

    def _train(self) -> None:
        """Let everything that still moves make up for what has just been fixed."""
        if self.trainer is not None:
            self.trainer.train()
            self.work.nested |= self.trainer.finish()
            self._take_free(self.trainer, self.solver.widths[-1])

    def _take_free(self, trainer: BlockTrainer, bits: int) -> None:
        # No copy: what the trainer moves is what the layer computes with.
        for name, tensor in trainer.free(bits).items():
            self._parameters[name].data = tensor

    def _weight(self, name: str, part: slice = slice(None)) -> Tensor:
        """Rows or experts of a weight, float32 (..., O, I); (W, ..., O, I) if widths have own."""
        if self.trainer is None or len(self.solver.widths) == 1:
            return self._parameters[name][part].float()
        return torch.stack([self.trainer.free(k)[name][part] for k in self.solver.widths])

    def _evidence(self, measure: Callable[[int], Measured]) -> tuple[Evidence, Tensor]:
        """Mean Hessian over the widths and the drift of each; tokens of the last."""
        hessian, drift, count = None, {}, len(self.streams.hidden)
        for bits in self.streams.hidden:
            own, moved, tokens = measure(bits)
            hessian = own / count if hessian is None else hessian.add_(own, alpha=1 / count)
            if moved is not None:
                drift[bits] = moved
        assert hessian is not None
        return Evidence(hessian, drift), tokens

    # -- routed experts --------------------------------------------------------------------------

    def _rounds(self, experts: int, inputs: int) -> list[tuple[int, int]]:
        size = max(1, EXPERT_HESSIAN_BYTES // (8 * inputs**2))
        return [(begin, min(begin + size, experts)) for begin in range(0, experts, size)]

    def _gate_up(self) -> None:
        """Gate and up projections of all experts, each on the tokens that chose it."""
        name = "mlp.experts.gate_up_proj"
        inputs = self._parameters[name].shape[-1]
        if (group := self._group([name], inputs)) is None:
            return
        workers = self.streams.workers

        def measure(bits: int, begin: int, end: int) -> Measured:
            wide = Moments(inputs, drift=self.solver.drift)
            routed = Moments(inputs, (end - begin,), drift=self.solver.drift)
            for x_TD, y_TD, route in self._inputs(bits, self._into_mlp):
                index_TK = self._chosen(x_TD, route)
                inside = (index_TK >= begin) & (index_TK < end)
                wide.add(x_TD, y_TD)
                routed.add(x_TD, y_TD, torch.where(inside, index_TK - begin, -1))
            return shrunk(routed.finish(workers), wide.finish(workers))

        self._experts(name, group, measure)

    def _down(self) -> None:
        """Down projections, each on its own expert's activations."""
        name = "mlp.experts.down_proj"
        inputs = self._parameters[name].shape[-1]
        if (group := self._group([name], inputs)) is None:
            return
        workers = self.streams.workers

        def neurons(layer: FissileDecoderLayer, x_TD: Tensor, expert: int) -> Tensor:
            experts = layer.mlp.experts
            assert isinstance(experts, FissileExperts)
            gate_up = nn.functional.linear(x_TD, experts.gate_up_proj[expert])
            gate, up = gate_up.chunk(2, dim=-1)
            return experts.act_fn(gate) * up

        def measure(bits: int, begin: int, end: int) -> Measured:
            every = Moments(inputs, (end - begin,), drift=self.solver.drift)
            routed = Moments(inputs, (end - begin,), drift=self.solver.drift)
            for x_TD, y_TD, route in self._inputs(bits, self._into_mlp):
                index_TK = self._chosen(x_TD, route)
                for e in range(begin, end):
                    h_TI, float_TI = neurons(self.layer, x_TD, e), None
                    if y_TD is not None and self.reference is not None:
                        float_TI = neurons(self.reference, y_TD, e)
                    all_T = torch.full((len(h_TI),), e - begin)
                    every.add(h_TI, float_TI, all_T)
                    routed.add(h_TI, float_TI, all_T.where((index_TK == e).any(1), -1))
            return shrunk(routed.finish(workers), every.finish(workers))

        self._experts(name, group, measure)

    def _experts(self, name: str, group: int, measure: Callable[[int, int, int], Measured]) -> None:
        experts, _, inputs = self._parameters[name].shape
        solved: list[NestedWeight] = []
        losses = []
        for begin, end in self._rounds(experts, inputs):

            def of_round(bits: int, begin: int = begin, end: int = end) -> Measured:
                return measure(bits, begin, end)

            evidence, tokens = self._evidence(of_round)
            if name.endswith("gate_up_proj"):
                self._starved(tokens, begin, inputs)
            # One table for the whole stack.
            table = solved[0].companding if solved else None
            part = self._weight(name, slice(begin, end))
            original_EOI = part if part.dim() == 3 else part[-1]
            if self.solver.residual:
                original_EOI = self._originals[name][begin:end].float()
            nested, table_WEO = solve_shared(
                self.solver, part, original_EOI, evidence, group, self.streams.workers, table
            )
            losses.append(relative_losses(self.solver.widths, table_WEO))
            solved.append(nested)
        mean = {k: sum(part[k] for part in losses) / len(losses) for k in losses[0]}
        self._solved(name, joined(solved, dim=0), mean)
        self._train()

    def _starved(self, counts: Tensor, begin: int, inputs: int) -> None:
        """Experts whose tokens cannot span their inputs rest on the layer's Hessian: say so."""
        for e, count in enumerate(counts.tolist()):
            if count < inputs:
                event = {
                    "kind": "starved_expert",
                    "module": f"mlp.experts.{begin + e}",
                    "detail": f"{count} calibration tokens for {inputs} inputs",
                    "value": float(count),
                }
                self.work.events.append(event)
