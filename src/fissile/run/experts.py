"""From statistics to experts and routers, for any active share; the recipe's own and the controls'.

Shapes: N windows, S tokens per window, T tokens, D model width, F FFN width, E routed experts,
L layers, H router heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fissile.config import Extract, Recipe
from fissile.families.sizes import expert_sizes
from fissile.io.units import UnitStore
from fissile.models.build import with_routing
from fissile.models.stream import StreamedModel
from fissile.refactor.align import align_experts
from fissile.refactor.calibrate import Windows, measure_oracle
from fissile.refactor.compensate import mean_restore
from fissile.refactor.convert import AnyPartition, routing_of
from fissile.refactor.domains import domain_masks, membership_partition
from fissile.refactor.oracle import RoutingReport, routing_report, top_experts
from fissile.refactor.partition import Partition, partition_neurons, random_partition
from fissile.refactor.router import distill_router, oracle_targets, router_logits
from fissile.refactor.statistics import NeuronStatistics
from fissile.refactor.training import Progress


@dataclass(frozen=True)
class Experts:
    """Experts of every layer with everything that can choose among them.

    Attributes:
        partitions: neurons of every layer, expert indices aligned across layers.
        selectors: per layer, the ridge router's "selector.weight" (E, D) and "selector.bias" (E,).
        router: tensors of the pre-gating router; empty if none was trained.
        curve: its training loss per step.
        report: agreement with the oracle, load and so on, JSON.
    """

    partitions: list[AnyPartition]
    selectors: list[dict[str, Tensor]]
    router: dict[str, Tensor]
    curve: list[float] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def compensated(recipe: Recipe) -> bool:
    """Whether anything makes up for the mean of neurons that are not computed."""
    return recipe.recover.refit or recipe.recover.method != "none"


def extract_layer(
    stats: NeuronStatistics, settings: Extract, share: float, seed: int, compensate: bool
) -> AnyPartition:
    """Partition one layer's neurons.

    Args:
        stats: of the layer.
        settings: the recipe's `extract` section.
        share: active share, which may differ from the recipe's.
        seed: of the clustering.
        compensate: decides the score "auto".
    """
    kind = settings.score
    if kind == "auto":
        kind = "fluctuation" if compensate else "energy"
    scores = stats.score(kind)
    if settings.method == "readme":
        kept = round(share * len(scores) / settings.multiple) * settings.multiple
        kept = min(len(scores), max(kept, settings.multiple))
        return membership_partition(domain_masks(stats.mean_abs_NF(), kept))
    sizes = expert_sizes(
        len(scores), settings.num_experts, settings.top_k, share, settings.multiple
    )
    shared, experts = sizes.shared, sizes.num_experts
    if settings.method == "random":
        return random_partition(scores, shared_size=shared, num_experts=experts, seed=seed)
    # Neurons of an expert should be active on the same tokens. Measured on the demo model: profiles
    # of magnitude, mean included, halve the oracle's error compared with signed or centred ones.
    features = stats.features(of="magnitude", centred=False)
    return partition_neurons(scores, features, shared_size=shared, num_experts=experts, seed=seed)


def static_layer(stats: NeuronStatistics, share: float, multiple: int) -> tuple[Partition, Tensor]:
    """The static control: FLAP's score on the FFN, and the bias that stands for what is dropped.

    Returns:
        A partition whose one routed expert is dropped, and the mean activations (F,) from which
        `static_bias` makes the bias.
    """
    scores = stats.score("fluctuation")
    kept = min(len(scores), round(share * len(scores) / multiple) * multiple)
    order = torch.argsort(scores, descending=True, stable=True)
    order = torch.cat([order[:kept].sort().values, order[kept:].sort().values])
    partition = Partition(order, kept, len(scores) - kept, 1)
    return partition, stats.mean_F()


def static_bias(partition: Partition, mean_F: Tensor, down_DF: Tensor) -> Tensor:
    """Bias (D,) that restores the mean output of the dropped neurons."""
    return mean_restore(mean_F, down_DF, partition.order_F[partition.shared_size :]).float()


def build_experts(
    dense: StreamedModel,
    windows: Windows,
    partitions: Sequence[AnyPartition],
    recipe: Recipe,
    store: UnitStore,
    *,
    pregate: bool,
    progress: Progress,
) -> Experts:
    """Measure the oracle, align experts, solve and train routers; finished parts are loaded.

    Args:
        dense: the dense model.
        windows: calibration text.
        partitions: experts of every layer, not yet aligned.
        recipe: its `route` section and seed.
        store: units of the oracle pass and of the result.
        pregate: train the pre-gating router too; ridge routers cost little and are always made.
        progress: called as (stage, done, total, detail).
    """
    if store.has("experts"):
        return _load(store, partitions)
    settings = recipe.route
    norms, solved = measure_oracle(
        dense,
        windows,
        partitions,
        ridge=settings.ridge,
        batch_tokens=recipe.calibrate.batch_tokens,
        store=store,
        progress=progress,
    )
    orders = align_experts(norms)
    if not isinstance(partitions[0], Partition):
        # Overlapping experts are domains: their indices mean the same in every layer already.
        orders = [torch.arange(p.num_experts) for p in partitions]
    aligned = [_reorder(p, order) for p, order in zip(partitions, orders, strict=True)]
    norms_LTE = torch.stack([n[:, order] for n, order in zip(norms, orders, strict=True)])
    selectors = [
        {name: tensor[order] for name, tensor in selector.items()}
        for selector, order in zip(solved, orders, strict=True)
    ]
    router: dict[str, Tensor] = {}
    curve: list[float] = []
    report: dict[str, Any] = {}
    if pregate:
        router, curve, report = _pregate(
            dense, windows, aligned, norms_LTE, recipe, store, progress
        )
    result = Experts(aligned, selectors, router, curve, report)
    _save(store, result, orders)
    return result


def _pregate(
    dense: StreamedModel,
    windows: Windows,
    partitions: Sequence[AnyPartition],
    norms_LTE: Tensor,
    recipe: Recipe,
    store: UnitStore,
    progress: Progress,
) -> tuple[dict[str, Tensor], list[float], dict[str, Any]]:
    """Train the pre-gating router; its tensors, loss curve and agreement with the oracle."""
    settings, top_k = recipe.route, recipe.extract.top_k
    config = with_routing(dense.config, routing_of("pregate", partitions, top_k, settings))
    trained = distill_router(
        dense,
        config,
        windows.ids_NS,
        oracle_targets(norms_LTE, settings.per_layer),
        settings,
        seed=recipe.seed,
        checkpoint=store.path("router_training"),
        progress=progress,
    )
    batch = recipe.calibrate.batch_tokens
    logits = router_logits(dense, config, trained.state, windows.ids_NS, batch)
    report = report_routing(norms_LTE, logits, top_k, windows)
    return trained.state, trained.curve, report


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


def _reorder(partition: AnyPartition, order: Tensor) -> AnyPartition:
    return partition.permute_experts(order) if isinstance(partition, Partition) else partition


def _save(store: UnitStore, experts: Experts, orders: Sequence[Tensor]) -> None:
    tensors = {f"order.{i}": order for i, order in enumerate(orders)}
    for i, selector in enumerate(experts.selectors):
        tensors |= {f"layer.{i}.{k}": v for k, v in selector.items()}
    tensors |= {f"router.{k}": v for k, v in experts.router.items()}
    store.save("experts", tensors, {"curve": experts.curve, "report": experts.report})


def _load(store: UnitStore, partitions: Sequence[AnyPartition]) -> Experts:
    tensors, record = store.load("experts")

    def group(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    layers = range(len(partitions))
    selectors = [group(f"layer.{i}.") for i in layers]
    return Experts(
        [_reorder(p, tensors[f"order.{i}"]) for i, p in enumerate(partitions)],
        selectors,
        group("router."),
        record["curve"],
        record["report"],
    )
