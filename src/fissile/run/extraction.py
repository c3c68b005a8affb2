"""The experts of a recipe: sizes of every layer under one budget, partitions, refinement, rivals.

Shapes: L layers, F FFN width, E routed experts, M neurons per expert, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from fissile.config import Extract, Recipe
from fissile.families.sizes import ExpertSizes, expert_sizes
from fissile.io.units import UnitStore
from fissile.models.stream import StreamedModel
from fissile.refactor.budget import layer_divergences, spread_budget, tail_losses
from fissile.refactor.calibrate import Windows
from fissile.refactor.convert import AnyPartition
from fissile.refactor.domains import MembershipPartition, domain_masks, membership_partition
from fissile.refactor.partition import Partition, partition_neurons, random_partition
from fissile.refactor.sample import RouterSees, pick_windows, refine_experts
from fissile.refactor.statistics import NeuronStatistics, Score
from fissile.refactor.training import Progress
from fissile.run.systems import sees_of
from fissile.workers import Workers


@dataclass(frozen=True)
class Calibrated:
    """What extraction starts from.

    Attributes:
        dense: the dense model.
        windows: calibration text.
        store: where the neuron statistics of every layer are.
        progress: called as (stage, done, total, detail).
        workers: processes of the run.
    """

    dense: StreamedModel
    windows: Windows
    store: UnitStore
    progress: Progress
    workers: Workers = field(default_factory=Workers)

    def statistics(self, layer: int) -> NeuronStatistics:
        """Neuron statistics of one layer, read when asked for."""
        return NeuronStatistics.from_state(self.store.load(f"layer_{layer:03d}")[0])

    def all_statistics(self) -> Iterator[NeuronStatistics]:
        """Of every layer, one in memory at a time."""
        return (self.statistics(i) for i in range(self.dense.num_layers))


def compensated(recipe: Recipe) -> bool:
    """Whether anything makes up for the mean of neurons that are not computed."""
    return recipe.recover.refit or recipe.recover.method != "none"


def score_of(recipe: Recipe) -> Score:
    """Score of the recipe: fluctuation where constants are compensated, else energy."""
    wanted = recipe.extract.score
    if wanted != "auto":
        return wanted
    return "fluctuation" if compensated(recipe) else "energy"


def partitions_of(given: Calibrated, recipe: Recipe, store: UnitStore) -> list[AnyPartition]:
    """Partitions of a recipe's experts; finished layers and the refinement are loaded.

    Args:
        given: calibration.
        recipe: its `extract`, `route` and `recover` sections; not for rivals, see `run.rivals`.
        store: units of the result.
    """
    settings = recipe.extract
    kind = MembershipPartition if settings.method == "readme" else Partition
    sizes = None if settings.method == "readme" else layer_sizes(given, recipe, store)
    result: list[AnyPartition] = []
    for i in range(given.dense.num_layers):
        if not store.has(name := f"layer_{i:03d}"):
            stats = given.statistics(i)
            seed = recipe.seed * 1000 + i
            made = (
                _domain_layer(stats, settings)
                if sizes is None
                else extract_layer(stats, sizes[i], settings.method, score_of(recipe), seed)
            )
            store.save(name, made.state())
            share = f"share {settings.active_share:g}"
            given.progress("extract", i + 1, given.dense.num_layers, share)
        result.append(kind.from_state(store.load(name)[0]))
    if settings.method != "fissile" or not settings.refine_rounds:
        return result
    return [*_refined(given, recipe, [p for p in result if isinstance(p, Partition)], store)]


def layer_sizes(given: Calibrated, recipe: Recipe, store: UnitStore) -> list[ExpertSizes]:
    """Sizes of shared and routed experts in every layer; the active share is their mean.

    Args:
        given: calibration.
        recipe: its `extract` section.
        store: the measured divergences are kept here.
    """
    settings, layers = recipe.extract, given.dense.num_layers
    ffn = given.dense.config.intermediate_size
    if settings.method == "readme":
        return [ExpertSizes(_kept(ffn, settings), 0, 1, _kept(ffn, settings) / ffn)] * layers
    even = expert_sizes(
        ffn, settings.num_experts, settings.top_k, settings.active_share, settings.multiple
    )
    if settings.allocation == "uniform" or settings.method != "fissile":
        return [even] * layers
    tails = [tail_losses(stats.score(score_of(recipe))) for stats in given.all_statistics()]
    weights = loss_weights(given, recipe, store, tails, round(even.active_share * ffn))
    unit, experts = settings.multiple, settings.num_experts
    idle = experts - settings.top_k
    losses = []
    for tail, weight in zip(tails, weights, strict=True):
        # Option u: experts of u units. Each must hold something, and all must fit.
        options = torch.full((ffn // experts // unit + 1,), torch.inf, dtype=torch.float64)
        for u in range(1, len(options)):
            options[u] = weight * float(tail[ffn - idle * u * unit])
        losses.append(options)
    chosen = spread_budget(losses, layers * even.expert // unit)
    return [_sizes(ffn, experts, settings.top_k, u * unit) for u in chosen]


def _sizes(ffn: int, experts: int, top_k: int, expert: int) -> ExpertSizes:
    shared = ffn - experts * expert
    return ExpertSizes(shared, expert, experts, (shared + top_k * expert) / ffn)


def loss_weights(
    given: Calibrated, recipe: Recipe, store: UnitStore, tails: Sequence[Tensor], kept: int
) -> list[float]:
    """What a unit of each layer's own loss costs the whole model: nats per unit, or one.

    Args:
        given: calibration.
        recipe: its `extract` section; without measured divergences all layers weigh alike.
        store: the divergences are kept here.
        tails: `tail_losses` of every layer.
        kept: neurons that stay while the divergence of a layer's pruning is measured.
    """
    if recipe.extract.allocation != "kl":
        return [1.0] * given.dense.num_layers
    if not store.has("divergences"):
        found = _divergences(given, recipe, kept)
        losses = [float(tail[kept]) for tail in tails]
        store.save("divergences", {"tails": torch.tensor(losses)}, {"divergences": found})
    return stored_weights(store)


def stored_weights(store: UnitStore) -> list[float]:
    """The same from an earlier measurement; empty if there was none."""
    if not store.has("divergences"):
        return []
    tensors, record = store.load("divergences")
    pairs = zip(record["divergences"], tensors["tails"].tolist(), strict=True)
    return [kl / tail if tail > 0 else 0.0 for kl, tail in pairs]


def _divergences(given: Calibrated, recipe: Recipe, kept: int) -> list[float]:
    masks, means = [], []
    for stats in given.all_statistics():
        ranked = stats.score(score_of(recipe)).argsort(descending=True, stable=True)
        mask = torch.zeros(len(ranked), dtype=torch.bool)
        masks.append(mask.index_fill(0, ranked[:kept], True))
        means.append(stats.mean_F() if compensated(recipe) else torch.zeros(len(ranked)))
    return layer_divergences(
        given.dense,
        pick_windows(given.windows, recipe.extract.allocation_tokens).ids_NS,
        masks,
        means,
        batch_tokens=recipe.calibrate.batch_tokens,
        progress=given.progress,
    )


def extract_layer(
    stats: NeuronStatistics, sizes: ExpertSizes, method: str, score: Score, seed: int
) -> Partition:
    """Partition one layer's neurons.

    Args:
        stats: of the layer.
        sizes: of the layer's experts.
        method: "fissile" or "random".
        score: importance that makes a neuron shared.
        seed: of the clustering.
    """
    scores, shared, experts = stats.score(score), sizes.shared, sizes.num_experts
    if method == "random":
        return random_partition(scores, shared_size=shared, num_experts=experts, seed=seed)
    # Neurons of an expert should be active on the same tokens. Measured on the demo model: profiles
    # of magnitude, mean included, halve the oracle's error compared with signed or centred ones.
    features = stats.features(of="magnitude", centred=False)
    return partition_neurons(scores, features, shared_size=shared, num_experts=experts, seed=seed)


def _domain_layer(stats: NeuronStatistics, settings: Extract) -> MembershipPartition:
    """Read-ME's overlapping experts: the neurons that matter most to each domain.

    By Read-ME's own score, mean magnitude, unless the recipe names one.
    """
    kept = _kept(len(stats.down_norm_F), settings)
    kind: Score = "magnitude" if settings.score == "auto" else settings.score
    return membership_partition(domain_masks(stats.domain_scores(kind), kept))


def _kept(width: int, settings: Extract) -> int:
    """Neurons that one of Read-ME's experts keeps, the permanent ones included."""
    unit = settings.multiple
    return min(width, max(unit, round(settings.active_share * width / unit) * unit))


def _refined(
    given: Calibrated, recipe: Recipe, partitions: list[Partition], store: UnitStore
) -> list[Partition]:
    """Partitions whose neurons moved to where the router's choices compute them."""
    if not store.has("refined"):
        means = [s.mean_F() for s in given.all_statistics()] if compensated(recipe) else None
        refined = refine_experts(
            given.dense,
            given.windows,
            partitions,
            top_k=recipe.extract.top_k,
            router=cast(RouterSees, sees_of(recipe.route)),
            tokens=recipe.extract.refine_tokens,
            rounds=recipe.extract.refine_rounds,
            ridge=recipe.route.ridge,
            batch_tokens=recipe.calibrate.batch_tokens,
            means=means,
            progress=given.progress,
        )
        orders = {f"order_{i:03d}": p.order_F for i, p in enumerate(refined.partitions)}
        store.save("refined", orders, {"captured": refined.captured})
    tensors = store.load("refined")[0]
    return [replace(p, order_F=tensors[f"order_{i:03d}"]) for i, p in enumerate(partitions)]
