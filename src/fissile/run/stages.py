"""The stages that make a model: calibrate, extract, route, recover, quantize, export.

Each reads what the stages before it left in the journal and returns a record for the report, so any
of them can be resumed or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.export.artifact import write_artifact
from fissile.families.sizes import expert_sizes
from fissile.models.source import MemorySource, UnitSource, load_source, save_units
from fissile.models.stream import StateSource, StreamedModel
from fissile.quant.layers import QuantizedLayer, Solver, quantize_model
from fissile.refactor.calibrate import Windows, gather_statistics
from fissile.refactor.convert import AnyPartition, ConvertedSource, routing_of
from fissile.refactor.domains import MembershipPartition
from fissile.refactor.partition import Partition
from fissile.refactor.recover import train_to_teacher
from fissile.refactor.refit import RefitLayer, refit_layers
from fissile.refactor.sample import RouterSees, refine_experts
from fissile.refactor.statistics import NeuronStatistics
from fissile.run.context import RunContext
from fissile.run.experts import (
    Experts,
    build_experts,
    compensated,
    extract_layer,
    static_bias,
    static_layer,
)
from fissile.run.ledger import Event
from fissile.run.nesting import artifact_tensors_of, nested_solver, origin_of


class Stages:
    """The stages of one run over one context; intermediate results are loaded when asked for."""

    def __init__(self, context: RunContext) -> None:
        self.context, self.recipe = context, context.recipe

    @cached_property
    def dense(self) -> StreamedModel:
        """The dense model, streamed."""
        return StreamedModel(self.context.source)

    @cached_property
    def windows(self) -> Windows:
        """Calibration windows."""
        return self.context.calibration()

    # -- calibrate, extract ----------------------------------------------------------------------

    def calibrate(self) -> dict[str, Any]:
        """Gather neuron statistics; they stay on disk, one unit a layer."""
        settings = self.recipe.calibrate
        layers = gather_statistics(
            self.dense,
            self.windows,
            batch_tokens=settings.batch_tokens,
            sketch_dim=settings.sketch_dim,
            seed=self.recipe.seed,
            store=self.context.journal.store("calibrate"),
            progress=self.context.tick,
        )
        return {
            "layers": sum(1 for _ in layers),
            "tokens": int(self.windows.ids_NS.numel()),
            "domains": list(self.windows.domains),
        }

    def statistics(self) -> Iterator[NeuronStatistics]:
        """Neuron statistics of every layer, one in memory at a time."""
        store = self.context.journal.store("calibrate")
        for i in range(self.dense.num_layers):
            yield NeuronStatistics.from_state(store.load(f"layer_{i:03d}")[0])

    def extract(self) -> dict[str, Any]:
        """Partition the neurons of every layer."""
        parts = self.partitions(self.recipe.extract.active_share, "extract")
        first = parts[0]
        record: dict[str, Any] = {"shared": [p.shared_size for p in parts]}
        if isinstance(first, MembershipPartition):
            record["kept"] = [len(p.order_P) for p in parts if isinstance(p, MembershipPartition)]
        if (store := self.context.journal.store("extract")).has("refined"):
            # Share of output energy that the predicted choices compute, before and after rounds.
            record |= store.load("refined")[1]
        return record | {"num_experts": first.num_experts}

    def partitions(self, share: float, unit: str) -> list[AnyPartition]:
        """Partitions at an active share, kept under `unit`."""
        settings, store = self.recipe.extract, self.context.journal.store(unit)
        kind = MembershipPartition if settings.method == "readme" else Partition
        result: list[AnyPartition] = []
        for i, stats in enumerate(self.statistics()):
            if not store.has(name := f"layer_{i:03d}"):
                seed = self.recipe.seed * 1000 + i
                made = extract_layer(stats, settings, share, seed, compensated(self.recipe))
                store.save(name, made.state())
                self.context.tick("extract", i + 1, self.dense.num_layers, f"share {share:g}")
            result.append(kind.from_state(store.load(name)[0]))
        if settings.method != "fissile" or not settings.refine_rounds:
            return result
        return self._refined([p for p in result if isinstance(p, Partition)], unit)

    def _refined(self, partitions: list[Partition], unit: str) -> list[AnyPartition]:
        """Partitions whose neurons moved to where the router's choices compute them."""
        settings, store = self.recipe.extract, self.context.journal.store(unit)
        if not store.has("refined"):
            route = self.recipe.route
            sees: RouterSees = "pregate_per_layer" if route.per_layer else "pregate"
            means = None
            if compensated(self.recipe):
                means = [stats.mean_F() for stats in self.statistics()]
            refined = refine_experts(
                self.dense,
                self.windows,
                partitions,
                top_k=settings.top_k,
                router=sees if route.kind == "pregate" else "layerwise",
                tokens=settings.refine_tokens,
                rounds=settings.refine_rounds,
                ridge=route.ridge,
                batch_tokens=self.recipe.calibrate.batch_tokens,
                means=means,
                progress=self.context.tick,
            )
            orders = {f"order_{i:03d}": p.order_F for i, p in enumerate(refined.partitions)}
            store.save("refined", orders, {"captured": refined.captured})
        tensors = store.load("refined")[0]
        return [replace(p, order_F=tensors[f"order_{i:03d}"]) for i, p in enumerate(partitions)]

    # -- route -----------------------------------------------------------------------------------

    def route(self) -> dict[str, Any]:
        """Make the routers of the recipe's active share."""
        return {"routing": self.experts.report, "router_curve": self.experts.curve}

    @cached_property
    def experts(self) -> Experts:
        """Experts and routers at the recipe's active share."""
        return self.experts_at(self.recipe.extract.active_share, "extract", "route")

    def experts_at(self, share: float, extract_unit: str, route_unit: str) -> Experts:
        """Experts and routers at another active share, for the controls."""
        pregate = "pregate" in (self.recipe.route.kind, *self.recipe.evaluate.controls)
        return build_experts(
            self.dense,
            self.windows,
            self.partitions(share, extract_unit),
            self.recipe,
            self.context.journal.store(route_unit),
            pregate=pregate,
            progress=self.context.tick,
        )

    # -- recover ---------------------------------------------------------------------------------

    def recover(self) -> dict[str, Any]:
        """Re-fit the shared projections, then train."""
        settings = self.recipe.recover
        events: list[Event] = []
        record: dict[str, Any] = {}
        source = self.raw_source()
        if settings.refit and not source.routing["shared_bias"]:
            what = "a layer has no shared neurons, so there is nothing to re-fit"
            events = [Event("refit_skipped", "recover", None, "mlp.shared", what)]
        elif settings.refit:
            record["refit"] = [[r.error_before, r.error_after, r.kind] for r in self.refits]
            events = [_rejected(i, r) for i, r in enumerate(self.refits) if r.kind == "none"]
        if settings.method != "none" and settings.steps:
            record["training"] = trained = self._train(self.untrained, "recover")
            if trained["after"] >= trained["before"]:
                what = f"held-out divergence {trained['before']:.4f} became {trained['after']:.4f}"
                events.append(Event("training_rejected", "recover", None, "model", what))
        self.context.ledger.replace_stage("recover", events)
        return record | {"recovery_curve": record.get("training", {}).get("curve", [])}

    @cached_property
    def refits(self) -> list[RefitLayer]:
        """Least-squares re-fit of every layer's shared projection."""
        return self.refit(self.raw_source(), "recover/refit")

    def raw_source(self) -> ConvertedSource:
        """The converted model before any recovery."""
        kind = self.recipe.route.kind
        if kind == "static":
            return self.static_source(self.recipe.extract.active_share)
        return self.routed_source(kind, self.experts)

    def routed_source(
        self, kind: Literal["pregate", "layerwise"], experts: Experts
    ) -> ConvertedSource:
        """A model that routes among `experts`, before any recovery."""
        top_k = self.recipe.extract.top_k
        routing = routing_of(kind, experts.partitions, top_k, self.recipe.route)
        router = experts.router if kind == "pregate" else None
        selectors = experts.selectors if kind == "layerwise" else None
        return ConvertedSource(
            self.context.source, experts.partitions, routing, router=router, selectors=selectors
        )

    def static_source(self, share: float) -> ConvertedSource:
        """Static pruning at an active share, with the bias that restores the mean."""
        settings = self.recipe.extract
        if settings.method != "readme":
            # Whole experts can make the routed model's share differ from the wanted one.
            ffn = self.context.source.config.intermediate_size
            counts = settings.num_experts, settings.top_k
            share = expert_sizes(ffn, *counts, share, settings.multiple).active_share
        partitions, biases = [], []
        for i, stats in enumerate(self.statistics()):
            partition, mean_F = static_layer(stats, share, settings.multiple)
            down = self.context.source.layer_state(i)["mlp.shared.down_proj.weight"]
            partitions.append(partition)
            biases.append(static_bias(partition, mean_F, down))
        routing = routing_of("static", partitions, 1, self.recipe.route)
        return ConvertedSource(self.context.source, partitions, routing, biases=biases)

    def refit(
        self, source: ConvertedSource, unit: str, prepare: Callable[..., None] | None = None
    ) -> list[RefitLayer]:
        """Re-fit a converted model on its own path."""
        return refit_layers(
            StreamedModel(source),
            self.dense,
            self.some_windows(self.recipe.recover.refit_tokens),
            batch_tokens=self.recipe.calibrate.batch_tokens,
            prepare=prepare,
            store=self.context.journal.store(unit),
            progress=self.context.tick,
        )

    @property
    def untrained(self) -> ConvertedSource:
        """The converted model after the re-fit, before training."""
        source = self.raw_source()
        if self.recipe.recover.refit and source.routing["shared_bias"]:
            source.refits = self.refits
        return source

    def _train(self, source: StateSource, unit: str) -> dict[str, Any]:
        """Train a converted model; its weights become units, trained if that helped."""
        store = self.context.journal.store(f"{unit}/model")
        if store.has("curve"):
            return store.load("curve")[1]
        result = train_to_teacher(
            load_source(source),
            load_source(self.context.source),
            self.training_windows(),
            self.recipe.recover,
            seed=self.recipe.seed,
            checkpoint=self.context.journal.store(unit).path("training"),
            progress=self.context.tick,
        )
        kept = source
        if result.after < result.before:
            state = dict(result.model.state_dict())
            if source.config.tie_word_embeddings:
                del state["lm_head.weight"]
            kept = MemorySource(source.config, state)
        save_units(kept, store)
        record = {"curve": result.curve, "before": result.before, "after": result.after}
        store.save("curve", {"curve": torch.tensor(result.curve)}, record)
        return record

    def some_windows(self, tokens: int) -> Tensor:
        """About so many tokens of the calibration windows, evenly spaced to keep the domains."""
        ids = self.windows.ids_NS
        count = min(len(ids), max(1, tokens // ids.shape[1]))
        return ids[torch.linspace(0, len(ids) - 1, count).round().long()]

    def training_windows(self) -> Tensor:
        """Calibration windows cut to the training context, int64."""
        ids = self.windows.ids_NS
        context = min(self.recipe.recover.context, ids.shape[1])
        return ids[:, : ids.shape[1] // context * context].reshape(-1, context)

    @cached_property
    def recovered(self) -> StateSource:
        """The model that is quantized: dense, converted, or converted and trained."""
        if not self.recipe.extract.enabled:
            return self.context.source
        settings = self.recipe.recover
        if settings.method != "none" and settings.steps:
            return UnitSource(self.untrained.config, self.context.journal.store("recover/model"))
        return self.untrained

    # -- quantize, export ------------------------------------------------------------------------

    def quantize(self) -> dict[str, Any]:
        """Solve every layer's integers."""
        solver = nested_solver(self.recipe.quantize, self.recipe.seed)
        events, rows = [], []
        for i, layer in enumerate(self.run_solver(self.recovered, solver, "quantize")):
            events += [Event(stage="quantize", layer=i, **event) for event in layer.events]
            for name, losses in layer.losses.items():
                loss = {str(width): value for width, value in losses.items()}
                rows.append({"layer": i, "tensor": name, "loss": loss})
        self.context.ledger.replace_stage("quantize", events)
        return {"layers": rows}

    def run_solver(
        self, source: StateSource, solver: Solver, unit: str
    ) -> Iterator[QuantizedLayer]:
        """Quantize a model with any solver, one layer in memory at a time."""
        settings = self.recipe.quantize
        return quantize_model(
            StreamedModel(source),
            self.some_windows(settings.tokens),
            solver,
            group_size=settings.group_size,
            attention=settings.attention,
            batch_tokens=self.recipe.calibrate.batch_tokens,
            store=self.context.journal.store(unit),
            progress=self.context.tick,
        )

    def export(self) -> dict[str, Any]:
        """Write the artifact."""
        from fissile.run.card import model_card

        context, settings = self.context, self.recipe.export
        store = context.journal.store("quantize") if self.recipe.quantize.enabled else None
        config, provide = artifact_tensors_of(self.recovered, store, self.recipe.quantize)
        if config.nested is not None:
            widths = config.nested["widths"]
            config.bits = settings.default_bits if settings.default_bits in widths else widths[-1]
        manifest = write_artifact(
            context.out / "model",
            config,
            context.source.family,
            provide,
            source=context.source.folder,
            dtype=settings.dtype,
            max_shard_bytes=settings.max_shard_bytes,
            origin=origin_of(context),
            card=lambda folder: model_card(folder, context.out, context.source.folder),
            overwrite=True,
        )
        sizes = [entry["bytes"] for entry in manifest["files"].values()]
        context.tick("export", 1, 1, f"{sum(sizes)} bytes")
        return {"files": len(sizes), "bytes": sum(sizes)}


def _rejected(layer: int, result: RefitLayer) -> Event:
    return Event(
        "refit_rejected",
        "recover",
        layer,
        "mlp.shared.down_proj",
        f"no change lowers the held-out error {result.error_before:.3e}",
        result.error_after,
    )
