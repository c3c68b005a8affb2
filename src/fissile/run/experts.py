"""From partitions to routers, for the recipe's own experts and for the controls'.

Shapes: N windows, S tokens per window, T tokens, D model width, F FFN width, E routed experts,
L layers, H router heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fissile.config import Recipe
from fissile.families.sizes import ExpertSizes
from fissile.io.units import UnitStore
from fissile.models.build import with_routing
from fissile.models.stream import StreamedModel
from fissile.refactor.align import align_experts
from fissile.refactor.calibrate import Windows, measure_oracle
from fissile.refactor.compensate import mean_restore
from fissile.refactor.convert import AnyPartition, ConvertedSource, routing_of
from fissile.refactor.oracle import (
    RoutingReport,
    routing_report,
    top_experts,
)
from fissile.refactor.partition import Partition
from fissile.refactor.router import (
    choice_costs,
    oracle_targets,
    router_logits,
    threshold_targets,
)
from fissile.refactor.sample import pick_windows
from fissile.refactor.statistics import NeuronStatistics
from fissile.run.distil import RouterLesson, distil
from fissile.run.extraction import Calibrated, partitions_of, stored_weights
from fissile.run.rivals import RIVALS, overlap_targets_of, rival_experts
from fissile.run.selectors import (
    calibrate_layers,
    calibrate_scores,
    choice_routing,
    judge_choices,
    layer_selectors,
)


@dataclass(frozen=True)
class Experts:
    """Experts of every layer with what chooses among them.

    Attributes:
        partitions: neurons of every layer, expert indices aligned across layers.
        top_k: experts chosen per token.
        selectors: per layer, tensors of a layer-wise router; empty lists of none.
        router: tensors of the pre-gating router; empty if none was trained.
        routing: further entries of `config.routing`: kind of selector, threshold, balance.
        curve: the router's training loss per step.
        report: agreement with the oracle, load and so on, JSON.
    """

    partitions: list[AnyPartition]
    top_k: int
    selectors: list[dict[str, Tensor]]
    router: dict[str, Tensor]
    routing: dict[str, Any] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def static_layer(stats: NeuronStatistics, sizes: ExpertSizes) -> tuple[Partition, Tensor]:
    """The static control: FLAP's score on the FFN, and the bias that stands for what is dropped.

    Args:
        stats: of the layer.
        sizes: of the routed layer; as many neurons are kept as that one computes.

    Returns:
        A partition whose one routed expert is dropped, and the mean activations (F,) from which
        `static_bias` makes the bias.
    """
    scores = stats.score("fluctuation")
    kept = round(sizes.active_share * len(scores))
    order = torch.argsort(scores, descending=True, stable=True)
    order = torch.cat([order[:kept].sort().values, order[kept:].sort().values])
    partition = Partition(order, kept, len(scores) - kept, 1)
    return partition, stats.mean_F()


def static_bias(partition: Partition, mean_F: Tensor, down_DF: Tensor) -> Tensor:
    """Bias (D,) that restores the mean output of the dropped neurons."""
    return mean_restore(mean_F, down_DF, partition.order_F[partition.shared_size :]).float()


def build_experts(
    given: Calibrated,
    recipe: Recipe,
    expert_store: UnitStore,
    router_store: UnitStore,
    path: StreamedModel | None = None,
) -> Experts:
    """Partition, measure the oracle, align experts, solve or train routers.

    Args:
        given: calibration.
        recipe: its `extract` and `route` sections and seed.
        expert_store: units of partitions and of the oracle pass; shared by recipes with the same
            experts.
        router_store: units of the routers.
        path: a converted model on whose own activations the oracle is measured, instead of the
            dense model's; its experts must be the recipe's.
    """
    if recipe.extract.method in RIVALS:
        partitions, selectors, routing, top_k = rival_experts(given, recipe, expert_store)
        return Experts(partitions, top_k, selectors, {}, routing)
    partitions, norms, ridges = _measured(given, recipe, expert_store, path)
    if recipe.route.kind == "layerwise":
        return _layerwise(given, recipe, partitions, norms, ridges, router_store, path)
    return _pregated(given, recipe, partitions, norms, expert_store, router_store)


def _measured(
    given: Calibrated, recipe: Recipe, store: UnitStore, path: StreamedModel | None
) -> tuple[list[AnyPartition], list[Tensor], list[dict[str, Tensor]]]:
    """Aligned partitions, the oracle's norms (T, E) and ridge routers of every layer."""
    partitions = partitions_of(given, recipe, store)
    if path is not None:
        partitions = _ordered(partitions, store.load("orders")[0])
    norms, ridges = measure_oracle(
        given.dense,
        given.windows,
        partitions,
        ridge=recipe.route.ridge,
        batch_tokens=recipe.calibrate.batch_tokens,
        store=store.under("oracle" if path is None else "oracle_converted"),
        path=path,
        progress=given.progress,
    )
    if path is not None:
        return partitions, norms, ridges
    if not store.has("orders"):
        orders = align_experts(norms)
        if not isinstance(partitions[0], Partition):
            # Overlapping experts are domains: their indices mean the same in every layer already.
            orders = [torch.arange(p.num_experts) for p in partitions]
        store.save("orders", {f"order.{i}": order for i, order in enumerate(orders)})
    tensors = store.load("orders")[0]
    orders = [tensors[f"order.{i}"] for i in range(len(partitions))]
    aligned = _ordered(partitions, tensors)
    norms = [norms_TE[:, order] for norms_TE, order in zip(norms, orders, strict=True)]
    ridges = [
        {name: tensor[order] for name, tensor in ridge.items()}
        for ridge, order in zip(ridges, orders, strict=True)
    ]
    return aligned, norms, ridges


def _ordered(partitions: Sequence[AnyPartition], tensors: dict[str, Tensor]) -> list[AnyPartition]:
    return [
        p.permute_experts(tensors[f"order.{i}"]) if isinstance(p, Partition) else p
        for i, p in enumerate(partitions)
    ]


def _layerwise(
    given: Calibrated,
    recipe: Recipe,
    partitions: list[AnyPartition],
    norms: list[Tensor],
    ridges: list[dict[str, Tensor]],
    store: UnitStore,
    path: StreamedModel | None,
) -> Experts:
    """Routers inside the layers."""
    if not store.has("selectors"):
        solved = layer_selectors(given, recipe, partitions, norms, ridges, path)
        tensors = {
            f"{i}.{name}": tensor
            for i, selector in enumerate(solved.selectors)
            for name, tensor in selector.items()
        }
        store.save("selectors", tensors, {"routing": solved.routing, "report": solved.report})
    tensors, record = store.load("selectors")
    selectors: list[dict[str, Tensor]] = [{} for _ in partitions]
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".")
        selectors[int(layer)][rest] = tensor
    routing, report = record["routing"], record["report"]
    result = Experts(partitions, recipe.extract.top_k, selectors, {}, routing, [], report)
    return _with_rule(given, recipe, result, store)


def _with_rule(given: Calibrated, recipe: Recipe, experts: Experts, store: UnitStore) -> Experts:
    """Layer-wise routers with the thresholds and biases that the recipe asks for."""
    entries = choice_routing(recipe)
    if not entries:
        return experts
    if not store.has("rule"):
        zero = {"selector.balance": torch.zeros(experts.partitions[0].num_experts)}
        start = [s | (zero if "selection_bias" in entries else {}) for s in experts.selectors]
        routing = routing_of("layerwise", experts.partitions, experts.top_k, recipe.route)
        routing |= experts.routing | entries
        source = ConvertedSource(given.dense.source, experts.partitions, routing, selectors=start)
        windows = pick_windows(given.windows, recipe.route.fit_tokens)
        biases, thresholds = calibrate_layers(StreamedModel(source), windows.ids_NS, recipe)
        tensors = {str(i): bias for i, bias in enumerate(biases)} or {"none": torch.zeros(1)}
        store.save("rule", tensors, {"threshold": thresholds})
    tensors, record = store.load("rule")
    selectors = [
        s | ({"selector.balance": tensors[str(i)]} if "selection_bias" in entries else {})
        for i, s in enumerate(experts.selectors)
    ]
    if record["threshold"]:
        entries["threshold"] = record["threshold"]
    return replace(experts, selectors=selectors, routing=experts.routing | entries)


def _rule(
    logits_HTE: Tensor, layers: int, recipe: Recipe
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same for a router that decides before layer 0, whose scores depend on no path."""
    entries = choice_routing(recipe)
    found = [calibrate_scores(logits_TE, recipe) for logits_TE in logits_HTE]
    biases = [bias_E for bias_E, _ in found if bias_E is not None]
    thresholds = [threshold for _, threshold in found if threshold is not None]
    if thresholds:
        entries["threshold"] = thresholds * (layers // len(thresholds))
    return ({"balance": torch.stack(biases)} if biases else {}), entries


def _pregated(
    given: Calibrated,
    recipe: Recipe,
    partitions: list[AnyPartition],
    norms: list[Tensor],
    expert_store: UnitStore,
    store: UnitStore,
) -> Experts:
    """A router that decides before layer 0."""
    top_k = recipe.extract.top_k
    if not store.has("router"):
        norms_LTE = torch.stack(norms)
        ids_NS = given.windows.ids_NS
        lesson = _lesson(given, recipe, partitions, norms_LTE, expert_store)
        trained = distil(given, recipe, lesson, store)
        config = with_routing(given.dense.config, lesson.routing)
        batch = recipe.calibrate.batch_tokens
        logits = router_logits(given.dense, config, trained.state, ids_NS, batch)
        report = report_routing(norms_LTE, logits, top_k, given.windows)
        chosen = [top_experts(logits_TE, top_k) for logits_TE in logits]
        report = judge_choices(chosen, norms_LTE, given.windows) | report
        tensors, routing = _rule(logits, len(norms), recipe)
        record: dict[str, Any] = {"curve": trained.curve, "report": report, "routing": routing}
        store.save("router", trained.state | tensors, record)
    tensors, kept = store.load("router")
    curve, report, routing = kept["curve"], kept["report"], kept["routing"]
    return Experts(partitions, top_k, [], tensors, routing, curve, report)


def _lesson(
    given: Calibrated,
    recipe: Recipe,
    partitions: list[AnyPartition],
    norms_LTE: Tensor,
    expert_store: UnitStore,
) -> RouterLesson:
    """What the recipe's router learns from the oracle, or from Read-ME's overlaps."""
    settings, top_k = recipe.route, recipe.extract.top_k
    routing = routing_of("pregate", partitions, top_k, settings)
    if settings.block == "readme":
        return RouterLesson(routing, overlap_targets_of(given, recipe, partitions))
    measured = stored_weights(expert_store) if settings.sensitivity else []
    weights_L = torch.tensor(measured) if any(measured) else None
    if settings.dynamic_k:
        most = choice_routing(recipe)["max_k"]
        targets = threshold_targets(norms_LTE, settings.per_layer, top_k, most, weights_L)
    else:
        targets = oracle_targets(norms_LTE, settings.per_layer, weights_L)
    if not settings.per_layer or weights_L is None:
        return RouterLesson(routing, targets)
    return RouterLesson(routing, targets, choice_costs(norms_LTE, weights_L))


def report_routing(
    norms_LTE: Tensor, logits_HTE: Tensor, top_k: int, windows: Windows
) -> dict[str, Any]:
    """Agreement of a pre-gating router with the oracle, per layer and summed up, as JSON."""
    tokens = windows.ids_NS.shape[1]
    sequence = torch.arange(len(windows.ids_NS)).repeat_interleave(tokens)
    chosen = [top_experts(logits, top_k) for logits in logits_HTE]
    found: list[RoutingReport] = [
        routing_report(
            chosen[i if len(chosen) > 1 else 0],
            norms_TE,
            domain_T=windows.domain_N.repeat_interleave(tokens),
            domains=len(windows.domains),
            sequence_T=sequence,
        )
        for i, norms_TE in enumerate(norms_LTE)
    ]
    # What a choice without regard to the token would get: K / E of the norms, in the mean.
    chance = norms_LTE.mean(-1).mean(-1) * top_k
    best = torch.stack([n.topk(top_k, dim=-1).values.sum(-1).mean() for n in norms_LTE])
    mass = torch.tensor([r.mass for r in found])
    gap = (mass * best - chance) / (best - chance).clamp_min(1e-12)
    loads = torch.stack([r.load_E for r in found])
    return {
        "expert_load": loads.tolist() if len(chosen) > 1 else loads[0].tolist(),
        "domain_expert": {"domains": list(windows.domains), "matrix": found[0].domain_NE.tolist()},
        "recall_at_k": [r.recall for r in found],
        "oracle_mass": mass.mean().item(),
        "gap_closed": gap.tolist(),
        "switch_rate": found[0].switch_rate,
        "entropy": found[0].entropy / math.log(max(2, norms_LTE.shape[-1])),
    }
