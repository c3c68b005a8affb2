"""Read-ME's targets, loss and router against the formulae of its paper and code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fissile.config import Route
from fissile.models.build import with_routing
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.refactor.domains import domain_masks, membership_partition
from fissile.refactor.oracle import HasExperts
from fissile.refactor.partition import random_partition
from fissile.refactor.readme_router import (
    distill_readme,
    embedding_start,
    overlap_targets,
    readme_targets,
)
from fissile.refactor.router import router_logits

T, F = 30, 60


def partition_of(kind: str) -> HasExperts:
    if kind == "disjoint":
        return random_partition(torch.rand(F), shared_size=10, num_experts=5, seed=0)
    mean_abs = torch.rand(3, F, generator=torch.Generator().manual_seed(0))
    return membership_partition(domain_masks(mean_abs, 30))


@pytest.mark.parametrize("rank_by", ["signed", "magnitude"])
@pytest.mark.parametrize("kind", ["disjoint", "overlapping"])
def test_overlaps_count_the_strongest_neurons(kind: str, rank_by: str) -> None:
    h = torch.randn(T, F, generator=torch.Generator().manual_seed(1))
    partition = partition_of(kind)
    found = overlap_targets(h, partition, rank_by)  # type: ignore[arg-type]
    experts = [set(index.tolist()) for index in partition.expert_indices()]
    n = len(experts[0])
    for t in range(T):
        value = (lambda c, t=t: h[t, c].abs()) if rank_by == "magnitude" else lambda c, t=t: h[t, c]
        ranked = sorted(range(F), key=lambda c: -float(value(c)))
        for e, own in enumerate(experts):
            sets = [ranked[: n - 1], *(ranked[: n * i // 5] for i in (4, 3, 2, 1))]
            want = sum(len(own & set(top)) for top in sets) / (3 * n)
            assert found[t, e].item() == pytest.approx(want, abs=1e-5)


def test_overlaps_of_tiny_experts_are_refused() -> None:
    tiny = random_partition(torch.rand(F), shared_size=0, num_experts=15, seed=0)
    with pytest.raises(ValueError, match="experts of 4 neurons"):
        overlap_targets(torch.zeros(T, F), tiny)
    with pytest.raises(ValueError, match="kind 'abs'"):
        overlap_targets(torch.zeros(T, F), tiny, "abs")  # type: ignore[arg-type]


def test_targets_reproduce_the_summed_loss() -> None:
    rng = torch.Generator().manual_seed(0)
    overlaps = torch.rand(4, T, 6, generator=rng)
    logits = torch.randn(T, 6, generator=rng)
    want: Tensor = torch.zeros(())
    for layer in overlaps:
        z = 10 * (layer - layer.mean())
        hard = torch.nn.functional.cross_entropy(logits, z.argmax(1), label_smoothing=0.5)
        soft = torch.nn.functional.cross_entropy(logits, z.softmax(1))
        want = want + 0.75 * hard + 0.25 * soft
    target = readme_targets(overlaps, per_layer=False)
    assert target.shape == (1, T, 6)
    got = -(target[0] * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(readme_targets(overlaps, True).sum(0, keepdim=True), target)


@pytest.mark.parametrize("width", [6, 40])
def test_the_table_starts_as_principal_components(width: int) -> None:
    table = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    table = table * torch.linspace(3, 0.1, 16) + 5
    start = embedding_start(table, width)
    assert start.shape == (200, width)
    u, s, _ = torch.linalg.svd(table.double() - table.double().mean(0), full_matrices=False)
    kept = min(width, 16)
    want = u[:, :kept] * s[:kept]
    want = want / want.square().mean().sqrt()
    cosine = torch.nn.functional.cosine_similarity(start[:, :kept].double(), want, dim=0)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        start[:, :kept].norm(dim=0).double(), want.norm(dim=0), rtol=1e-4, atol=0
    )
    assert bool((start[:, kept:] == 0).all())


def test_the_router_learns_what_the_text_before_decides(demo_model: Path) -> None:
    """A planted rule, the last token's parity, on the trained model's vocabulary."""
    dense = StreamedModel(CheckpointSource(demo_model))
    routing = {
        "kind": "pregate",
        "num_experts": 2,
        "top_k": 1,
        "shared_sizes": [0] * 6,
        "expert_sizes": [512] * 6,
        "per_layer": False,
        "layout": "disjoint",
        "router": {"block": "readme", "width": 32, "inner_dim": 32, "query_heads": 4},
    }
    config = with_routing(dense.config, routing)
    ids = torch.randint(3, 40, (64, 24), generator=torch.Generator().manual_seed(0))
    before = torch.cat([ids[:, :1], ids[:, :-1]], 1)
    overlaps = torch.nn.functional.one_hot(before % 2, 2).float().view(1, -1, 2)
    settings = Route(steps=120, batch_tokens=768, learning_rate=1e-2)
    targets = readme_targets(overlaps, per_layer=False)
    trained = distill_readme(dense, config, ids[:48], targets[:, : 48 * 24], settings, seed=0)
    assert trained.curve[-1] < 0.9 * trained.curve[0]
    logits = router_logits(dense, config, trained.state, ids[48:], 512)
    right = (logits[0].argmax(1) == overlaps[0, 48 * 24 :].argmax(1)).double().mean()
    assert right > 0.9
    routing["router"] = {"block": "token", "inner_dim": 32}
    with pytest.raises(ValueError, match='block must be "readme"'):
        distill_readme(dense, with_routing(config, routing), ids, targets, settings, seed=0)
