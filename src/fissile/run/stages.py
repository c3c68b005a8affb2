"""The stages that make a model: calibrate, extract, route, recover, quantize, export.

Each reads what the stages before it left in the journal and returns a record for the report, so any
of them can be resumed or replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.config import Recipe
from fissile.export.artifact import write_artifact
from fissile.io.units import UnitStore
from fissile.models.source import MemorySource, UnitSource, load_source, save_units
from fissile.models.stream import StateSource, StreamedModel
from fissile.quant.layers import QuantizedLayer, quantize_model, read_layer
from fissile.refactor.calibrate import Windows, gather_statistics
from fissile.refactor.convert import ConvertedSource, routing_of
from fissile.refactor.domains import MembershipPartition
from fissile.refactor.recover import train_to_teacher
from fissile.refactor.refit import RefitLayer, refit_layers
from fissile.refactor.sample import pick_windows
from fissile.run.context import RunContext
from fissile.run.distil import distil_along
from fissile.run.experts import Experts, build_experts, static_bias, static_layer
from fissile.run.extraction import Calibrated, layer_sizes, partitions_of
from fissile.run.generated import with_generated
from fissile.run.ledger import Event
from fissile.run.nesting import artifact_tensors_of, origin_of
from fissile.run.rivals import RIVALS, rival_experts
from fissile.run.solving import Job
from fissile.run.systems import expert_unit, router_name, router_unit
from fissile.run.together import earlier_norms
from fissile.run.tuning import Tuning


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

    @cached_property
    def given(self) -> Calibrated:
        """What extraction starts from."""
        store = self.context.journal.store("calibrate")
        return Calibrated(self.dense, self.windows, store, self.context.tick, self.context.workers)

    def extract(self) -> dict[str, Any]:
        """Partition the neurons of every layer."""
        store = self.context.journal.store("extract")
        if self.recipe.extract.method in RIVALS:
            parts = rival_experts(self.given, self.recipe, store)[0]
        else:
            parts = partitions_of(self.given, self.recipe, store)
        first = parts[0]
        record: dict[str, Any] = {"shared": [p.shared_size for p in parts]}
        if isinstance(first, MembershipPartition):
            record["kept"] = [len(p.order_P) for p in parts if isinstance(p, MembershipPartition)]
        for unit in ("refined", "divergences"):
            # Share of output energy that the predicted choices compute, before and after rounds;
            # nats that pruning each layer alone costs.
            if store.has(unit):
                record |= store.load(unit)[1]
        return record | {"num_experts": first.num_experts}

    # -- route -----------------------------------------------------------------------------------

    def route(self) -> dict[str, Any]:
        """Make the routers of the recipe's active share."""
        report = dict(self.experts.report)
        fit = report.pop("held_out_recall", None)
        quality = report.pop("quality", None)
        return {
            "routing": report,
            "router_curve": self.experts.curve,
            "router_fit": fit,
            "routers": [self.router_row(self.recipe, quality)] if quality else [],
        }

    def router_row(self, recipe: Recipe, quality: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics.json about one router."""
        return {"name": router_name(recipe), "share": recipe.extract.active_share, **quality}

    @cached_property
    def experts(self) -> Experts:
        """Experts and routers of the recipe."""
        return self.experts_of(self.recipe)

    def experts_of(self, recipe: Recipe) -> Experts:
        """Experts and routers of the recipe or of a control's."""
        journal = self.context.journal
        expert_store = journal.store(expert_unit(recipe, self.recipe))
        router_store = journal.store(router_unit(recipe, self.recipe))
        found = build_experts(self.given, recipe, expert_store, router_store)
        if not recipe.route.on_trajectory:
            return found
        path = StreamedModel(self.routed_source(recipe, found))
        store = router_store.under("on_trajectory")
        return build_experts(self.given, recipe, expert_store, store, path)

    # -- recover ---------------------------------------------------------------------------------

    def recover(self) -> dict[str, Any]:
        """Re-fit the shared projections, then train."""
        settings = self.recipe.recover
        events: list[Event] = []
        record: dict[str, Any] = {}
        source = self.raw_source()
        if settings.refit and not min(source.routing["shared_sizes"]):
            what = "a layer has no shared neurons, so there is nothing to re-fit"
            events = [Event("refit_skipped", "recover", None, "mlp.shared", what)]
        elif settings.refit:
            record["refit"] = [[r.error_before, r.error_after, r.kind] for r in self.refits]
            events = [_rejected(i, r) for i, r in enumerate(self.refits) if r.kind == "none"]
        if settings.trains:
            record["training"] = trained = self.train(self.untrained, "recover")
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
        if self.recipe.route.kind == "static":
            return self.static_source(self.recipe)
        return self.routed_source(self.recipe, self.experts)

    def routed_source(self, recipe: Recipe, experts: Experts) -> ConvertedSource:
        """A model that routes among `experts`, before any recovery."""
        kind: Literal["pregate", "layerwise"] = (
            "pregate" if recipe.route.kind == "pregate" and experts.router else "layerwise"
        )
        routing = routing_of(kind, experts.partitions, experts.top_k, recipe.route)
        routing["shared_bias"] &= recipe.recover.constants
        return ConvertedSource(
            self.context.source,
            experts.partitions,
            routing | experts.routing,
            router=experts.router or None,
            selectors=experts.selectors or None,
        )

    def static_source(self, recipe: Recipe) -> ConvertedSource:
        """Static pruning with as many neurons per layer as the recipe computes, means restored."""
        store = self.context.journal.store(expert_unit(recipe, self.recipe))
        sizes = layer_sizes(self.given, recipe, store)
        partitions, biases = [], []
        for i, stats in enumerate(self.given.all_statistics()):
            partition, mean_F = static_layer(stats, sizes[i])
            down = self.context.source.layer_state(i)["mlp.shared.down_proj.weight"]
            partitions.append(partition)
            biases.append(static_bias(partition, mean_F, down))
        routing = routing_of("static", partitions, 1, self.recipe.route)
        routing["shared_bias"] &= recipe.recover.constants
        return ConvertedSource(self.context.source, partitions, routing, biases=biases)

    def refit(
        self, source: ConvertedSource, unit: str, prepare: Callable[..., None] | None = None
    ) -> list[RefitLayer]:
        """Re-fit a converted model on its own path."""
        settings = self.recipe.recover
        return refit_layers(
            StreamedModel(source),
            self.dense,
            pick_windows(self.windows, settings.refit_tokens).ids_NS,
            batch_tokens=self.recipe.calibrate.batch_tokens,
            scope=settings.refit_scope,
            target=settings.refit_target,
            restore=settings.restores,
            prepare=prepare,
            store=self.context.journal.store(unit),
            progress=self.context.tick,
        )

    @property
    def untrained(self) -> ConvertedSource:
        """The converted model after the re-fit, before training."""
        source = self.raw_source()
        if self.recipe.recover.refit and min(source.routing["shared_sizes"]):
            return source.refitted(self.refits)
        return source

    def train(self, source: StateSource, unit: str) -> dict[str, Any]:
        """Train a converted model; its weights become units, trained if that helped."""
        store, workers = self.context.journal.store(f"{unit}/model"), self.context.workers
        if store.has("curve"):
            return store.load("curve")[1]
        workers.call({"task": "train"})
        result = train_to_teacher(
            load_source(source),
            load_source(self.context.source),
            self.training_windows(),
            self.recipe.recover,
            seed=self.recipe.seed,
            checkpoint=self.context.journal.store(unit).path("training"),
            targets=self.targets,
            norms=earlier_norms(self.recipe),
            progress=self.context.tick,
            workers=workers,
        )
        if not workers.main:
            return {}
        kept = source
        if result.after < result.before:
            state = dict(result.model.state_dict())
            if source.config.tie_word_embeddings:
                del state["lm_head.weight"]
            kept = MemorySource(source.config, state)
        save_units(kept, store)
        record = {
            "curve": result.curve,
            "before": result.before,
            "after": result.after,
            "tokens": result.tokens,
            "training_seconds": round(result.seconds, 1),
            "router_curve": result.router_curve,
        }
        store.save("curve", {"norms": torch.tensor(result.norms, dtype=torch.float64)}, record)
        return record

    @property
    def targets(self) -> UnitStore:
        """The dense model's logits on the training windows, the same for all that is trained."""
        return self.context.journal.store("recover/teacher")

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
        if settings.trains:
            return UnitSource(self.untrained.config, self.context.journal.store("recover/model"))
        return self.untrained

    # -- quantize, export ------------------------------------------------------------------------

    def quantize(self) -> dict[str, Any]:
        """Solve every layer's integers."""
        events, rows = [], []
        for i, layer in enumerate(self.solved(Job("quantize"))):
            events += [Event(stage="quantize", layer=i, **event) for event in layer.events]
            for name, losses in layer.losses.items():
                loss = {str(width): value for width, value in losses.items()}
                rows.append({"layer": i, "tensor": name, "loss": loss})
        self.context.ledger.replace_stage("quantize", events)
        return {"layers": rows}

    def tune(self) -> dict[str, Any]:
        """Train scales, zeros and norms of the quantized model."""
        return self.tuned(self.recovered, "quantize")

    def tuned(self, source: StateSource, unit: str) -> dict[str, Any]:
        """Train the floats of any quantized model whose layers lie in a store."""
        work = Tuning(
            self.context.source,
            self.quantize_windows(self.recipe.quantize.generated),
            self.recipe.quantize,
            self.recipe.seed,
            self.context.journal.store("tune/teacher"),
            self.context.tick,
        )
        return work.run(source, self.context.journal.store(unit))

    def quantize_windows(self, generated: int) -> Tensor:
        """Windows of the text, and as many times more that the dense model writes, int64."""
        return with_generated(
            self.context.source,
            pick_windows(self.windows, self.recipe.quantize.tokens).ids_NS,
            generated,
            self.recipe.seed,
            self.context.journal.store("quantize/text"),
            self.context.tick,
        )

    def source_of(self, job: Job) -> StateSource:
        """The float model that is quantized."""
        return self.context.source if job.dense else self.recovered

    def solved(self, job: Job) -> Iterator[QuantizedLayer]:
        """Quantize a model with any solver, one layer in memory at a time; all must be taken."""
        settings, workers = self.recipe.quantize, self.context.workers
        source, store = self.source_of(job), self.context.journal.store(job.unit)
        layers = range(source.config.num_base_layers)
        if workers.main and all(store.has(f"layer_{i:03d}") for i in layers):
            yield from (read_layer(store, i) for i in layers)
            return
        ids_NS = self.quantize_windows(job.generated(settings))
        workers.call(job.task())
        yield from quantize_model(
            StreamedModel(source),
            ids_NS,
            job.solver(self.recipe),
            group_size=settings.group_size,
            attention=settings.attention,
            batch_tokens=self.recipe.calibrate.batch_tokens,
            store=store,
            progress=self.context.tick,
            workers=workers,
        )

    def join(self, task: dict[str, Any]) -> None:
        """Take part in what the main process has called for."""
        match task["task"]:
            case "route":
                distil_along(self.given, task)
            case "train":
                self.train(self.untrained, "recover")
            case "quantize":
                for _ in self.solved(Job.of(task)):
                    pass

    def export(self) -> dict[str, Any]:
        """Write the artifact."""
        from fissile.run.card import model_card

        context, settings = self.context, self.recipe.export
        store = context.journal.store("quantize") if self.recipe.quantize.enabled else None
        config, provide = artifact_tensors_of(self.recovered, store, self.recipe.quantize)
        if config.nested is not None and "mixed" in config.nested:
            config.bits = None
        elif config.nested is not None:
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
