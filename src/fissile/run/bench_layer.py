"""How long the conversion of one layer takes, and how much memory, on made-up activations.

What is timed is what a run calls for every layer: statistics, partition, expert norms, moments and
the layer-wise router. Making the activations is not; in a run the dense model's own matrix products
take that place. Shapes: T tokens, D model width, F FFN width, E experts, C planted clusters.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from fissile.config import Strict
from fissile.errors import UsageError
from fissile.eval.result import machine, versions
from fissile.refactor.calibrate import OracleMeasure
from fissile.refactor.layerwise import ridge_selector
from fissile.refactor.oracle import chosen_mask, top_experts
from fissile.refactor.partition import Partition, cluster, partition_neurons
from fissile.refactor.statistics import NeuronStatistics, column_norms
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.context import peak_rss_bytes

_CAUSES = 64
"""Coordinates of the MLP's input that decide which clusters are active."""


class LayerBench(Strict):
    """Shape of the layer and size of the calibration; the defaults are a layer of Llama-2-7B."""

    tokens: int = Field(131072, gt=0, description="calibration tokens")
    width: int = Field(4096, ge=_CAUSES, description="model width")
    neurons: int = Field(11008, gt=0, description="FFN width")
    shared: int = Field(1376, ge=0, description="neurons always computed")
    experts: int = Field(14, gt=0, description="routed experts")
    top_k: int = Field(4, gt=0, description="experts chosen per token, for the quality check")
    domains: int = Field(4, gt=0, description="labels of the calibration text")
    sketch_dim: int = Field(256, ge=8, le=1024, description="width of the activation sketch")
    batch_tokens: int = Field(8192, gt=0, description="tokens per forward pass")
    ridge: float = Field(1e-2, gt=0, description="of the layer-wise router")
    seed: int = Field(0, description="of activations, weights and clustering")


@dataclass
class _Clock:
    """Wall and processor seconds by step."""

    wall: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began, used = time.perf_counter(), time.process_time()
        yield
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - began
        self.processor[name] = self.processor.get(name, 0.0) + time.process_time() - used


class _Activations:
    """Batches of (x, h) in which planted groups of neurons are active together.

    A group's activity is the positive part of a projection of x, and its neurons are noise times
    that: what an oracle can find and a linear router can partly foresee.
    """

    def __init__(self, settings: LayerBench) -> None:
        self.settings = settings
        rng = torch.Generator().manual_seed(settings.seed)
        self.group_F = torch.randint(0, settings.experts, (settings.neurons,), generator=rng)
        self.causes_CD = torch.randn(settings.experts, _CAUSES, generator=rng) / _CAUSES**0.5
        self.down_DF = torch.randn(settings.width, settings.neurons, generator=rng)
        # Neurons of the shared part: always active, so that the scores set them apart.
        steady = torch.randperm(settings.neurons, generator=rng)[: settings.shared]
        self.steady_F = torch.zeros(settings.neurons, dtype=torch.bool)
        self.steady_F[steady] = True

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Yield x (T, D), h (T, F) and the place of the batch in the stream; always the same."""
        s = self.settings
        for begin in range(0, s.tokens, s.batch_tokens):
            rng = torch.Generator().manual_seed(s.seed * 1_000_003 + begin)
            rows = slice(begin, min(begin + s.batch_tokens, s.tokens))
            x_TD = torch.randn(rows.stop - begin, s.width, generator=rng)
            activity_TC = (x_TD[:, :_CAUSES] @ self.causes_CD.T).clamp_min_(0.05)
            h_TF = torch.randn(len(x_TD), s.neurons, generator=rng)
            for h, activity in zip(h_TF.split(256), activity_TC.split(256), strict=True):
                h *= torch.where(self.steady_F, 2.0, activity.index_select(1, self.group_F))
            yield x_TD, h_TF, rows


def bench_layer(settings: LayerBench, progress: Progress) -> dict[str, Any]:
    """Convert one made-up layer with the functions that a run uses; seconds, memory, quality.

    Args:
        settings: sizes.
        progress: called as (stage, done, total, detail).

    Returns:
        The row: seconds by step (wall and processor), peak memory of the process with what the
        activations take, conditions, and how much of the planted structure was found.

    Raises:
        UsageError: sizes that do not fit together.
    """
    routed = settings.neurons - settings.shared
    if routed <= 0 or routed % settings.experts:
        raise UsageError(
            f"neurons {settings.neurons} less shared {settings.shared} are not"
            f" {settings.experts} equal experts"
        )
    if settings.top_k > settings.experts:
        raise UsageError(f"top_k {settings.top_k} is more than the {settings.experts} experts")
    load, clock, source = os.getloadavg()[0], _Clock(), _Activations(settings)
    stats = _statistics(settings, source, clock, progress)
    with clock.step("partition"):
        partition = partition_neurons(
            stats.score("fluctuation"),
            stats.features(of="magnitude", centred=False),
            shared_size=settings.shared,
            num_experts=settings.experts,
            seed=settings.seed,
        )
    with clock.step("factors"):
        measure = OracleMeasure(source.down_DF, partition)
    for done, (x_TD, h_TF, _) in enumerate(source, start=1):
        with clock.step("norms and moments"):
            measure.add(x_TD, h_TF)
        progress("oracle", done, -(-settings.tokens // settings.batch_tokens), "")
    with clock.step("router"):
        selector = ridge_selector(measure.moments, settings.ridge)
    total = sum(clock.wall.values())
    return {
        "seconds": total,
        "processor_seconds": sum(clock.processor.values()),
        "by_step": dict(clock.wall),
        "processor_by_step": dict(clock.processor),
        "clustering_seconds": _clustering(settings, stats, partition),
        "peak_rss_bytes": peak_rss_bytes(),
        "quality": _quality(settings, source, partition, measure, selector),
        "conditions": {
            **settings.model_dump(),
            "counted": "statistics, partition, expert norms, moments, layer-wise router; not the"
            " making of the activations",
            "load_average": {"before": load, "after": os.getloadavg()[0]},
            **machine(),
            "versions": versions(),
        },
    }


def _statistics(
    settings: LayerBench, source: _Activations, clock: _Clock, progress: Progress
) -> NeuronStatistics:
    with clock.step("statistics"):
        stats = NeuronStatistics(
            column_norms(source.down_DF),
            domains=settings.domains,
            sketch_dim=settings.sketch_dim,
            seed=settings.seed,
        )
    for done, (_, h_TF, rows) in enumerate(source, start=1):
        index_T = torch.arange(rows.start, rows.stop)
        domain_T = index_T * settings.domains // settings.tokens
        with clock.step("statistics"):
            stats.add(h_TF, domain_T, index_T)
        progress("statistics", done, -(-settings.tokens // settings.batch_tokens), "")
    return stats


def _clustering(settings: LayerBench, stats: NeuronStatistics, partition: Partition) -> float:
    """Seconds of the balanced clustering alone."""
    features = stats.features(of="magnitude", centred=False)
    features = features[partition.order_F[partition.shared_size :]]
    began = time.perf_counter()
    cluster(features, partition.num_experts, partition.expert_size, seed=settings.seed)
    return time.perf_counter() - began


def _quality(
    settings: LayerBench,
    source: _Activations,
    partition: Partition,
    measure: OracleMeasure,
    selector: dict[str, Tensor],
) -> dict[str, float]:
    """Whether the work was real: planted groups found, router against oracle and chance."""
    steady = source.steady_F[partition.shared].double().mean()
    groups_EM = source.group_F[partition.experts_EM]
    counts_EC = torch.nn.functional.one_hot(groups_EM, settings.experts).sum(1)
    x_TD, _, rows = next(iter(source))
    logits_TE = torch.nn.functional.linear(
        x_TD, selector["selector.weight"], selector["selector.bias"]
    )
    best_TE = chosen_mask(top_experts(measure.norms_TE()[rows], settings.top_k), settings.experts)
    ours_TE = chosen_mask(top_experts(logits_TE, settings.top_k), settings.experts)
    return {
        "shared_found": float(steady) if settings.shared else float("nan"),
        "purity": float(counts_EC.amax(1).sum() / counts_EC.sum()),
        "recall_at_k": float((best_TE & ours_TE).sum() / best_TE.sum()),
        "chance": settings.top_k / settings.experts,
    }


BENCH = Bench(LayerBench, bench_layer)
