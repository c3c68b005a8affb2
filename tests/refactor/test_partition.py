"""Balanced assignment against an exact solver, clustering against planted structure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fissile.refactor.partition import (
    Partition,
    balanced_assign,
    build_partition,
    choose_shared,
    cluster,
    partition_neurons,
    random_partition,
)

Cost = Callable[[np.random.Generator, int, int], np.ndarray]
COSTS: dict[str, Cost] = {
    "uniform": lambda rng, n, k: rng.random((n, k)),
    "integers with ties": lambda rng, n, k: rng.integers(0, 4, (n, k)).astype(float),
    "heavy tailed": lambda rng, n, k: rng.standard_cauchy((n, k)),
    "one cluster is better": lambda rng, n, k: rng.random((n, k)) + 5 * np.arange(k),
    "items of different scale": lambda rng, n, k: (
        rng.random((n, k)) * rng.lognormal(0, 3, (n, 1)) + 1e3 * rng.random((n, 1))
    ),
    "all alike": lambda rng, n, k: np.full((n, k), 2.5),
}


def exact(cost: np.ndarray, capacity: int | list[int]) -> float:
    cost = np.repeat(cost, capacity, axis=1)
    return float(cost[linear_sum_assignment(cost)].sum())


@pytest.mark.parametrize("kind", COSTS)
@pytest.mark.parametrize(
    ("clusters", "capacity"), [(1, 5), (2, 1), (2, 30), (5, 7), (8, 32), (14, 3), (40, 1)]
)
def test_assignment_is_optimal(kind: str, clusters: int, capacity: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        cost = COSTS[kind](rng, clusters * capacity, clusters)
        labels = balanced_assign(torch.from_numpy(cost), capacity).numpy()
        assert np.bincount(labels, minlength=clusters).tolist() == [capacity] * clusters
        found = cost[np.arange(len(cost)), labels].sum()
        assert found == pytest.approx(exact(cost, capacity), rel=1e-9, abs=1e-9)


def test_assignment_of_many_items_is_optimal() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(8, 16))
    x = centres[rng.choice(8, 1200, p=rng.dirichlet(np.ones(8)))] + rng.normal(size=(1200, 16))
    cost = ((x[:, None] - centres) ** 2).sum(-1)
    labels = balanced_assign(torch.from_numpy(cost), 150).numpy()
    assert np.bincount(labels).tolist() == [150] * 8
    assert cost[np.arange(1200), labels].sum() == pytest.approx(exact(cost, 150), rel=1e-12)


@pytest.mark.parametrize("kind", COSTS)
def test_clusters_of_different_sizes(kind: str) -> None:
    sizes = [60, 0, 10, 25, 25]
    for seed in range(3):
        cost = COSTS[kind](np.random.default_rng(seed), 120, 5)
        labels = balanced_assign(torch.from_numpy(cost), torch.tensor(sizes)).numpy()
        assert np.bincount(labels, minlength=5).tolist() == sizes
        found = cost[np.arange(120), labels].sum()
        assert found == pytest.approx(exact(cost, sizes), rel=1e-9, abs=1e-9)


def test_costs_below_the_tolerance_of_ties_end() -> None:
    """Three items of large cost and many whose costs differ by about as much as rounding may."""
    sizes = [7] * 7 + [71]
    for seed in (0, 36):
        cost = -1e-10 * np.exp(np.random.default_rng(seed).normal(size=(120, 8)))
        cost[:3] *= 1e12
        labels = balanced_assign(torch.from_numpy(cost), torch.tensor(sizes)).numpy()
        assert np.bincount(labels).tolist() == sizes
        found = cost[np.arange(120), labels]
        assert found[:3].sum() == pytest.approx(cost[:3].min(1).sum(), rel=1e-9)
        assert found.sum() == pytest.approx(exact(cost, sizes), rel=1e-12)


def test_assignment_refuses_what_cannot_be_balanced() -> None:
    with pytest.raises(ValueError, match=r"cannot fill clusters of \[3, 3, 3\]"):
        balanced_assign(torch.zeros(10, 3), 3)
    with pytest.raises(ValueError, match=r"cannot fill clusters of \[7, 4, -1\]"):
        balanced_assign(torch.zeros(10, 3), torch.tensor([7, 4, -1]))
    with pytest.raises(ValueError, match="NaN or infinite"):
        balanced_assign(torch.full((6, 2), torch.nan), 3)


def planted(experts: int, size: int, noise: float) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(experts, 24, generator=rng) * 3
    labels = torch.arange(experts).repeat_interleave(size)
    labels = labels[torch.randperm(len(labels), generator=rng)]
    return centres[labels] + noise * torch.randn(len(labels), 24, generator=rng), labels


def test_cluster_finds_planted_groups() -> None:
    x, labels = planted(6, 40, noise=0.3)
    found = cluster(x, 6, 40, seed=0)
    pairs = {(int(a), int(b)) for a, b in zip(labels, found, strict=True)}
    assert len(pairs) == 6
    assert torch.equal(found, cluster(x, 6, 40, seed=0))


def test_cluster_ends_where_no_exchange_helps() -> None:
    x, _ = planted(4, 25, noise=3.0)
    labels = cluster(x, 4, 25, seed=1, iterations=100)
    centres = torch.stack([x[labels == e].mean(0) for e in range(4)])
    cost = torch.cdist(x, centres).square().double()
    assert cost.gather(1, labels[:, None]).sum().item() == pytest.approx(exact(cost.numpy(), 25))
    dealt = cost[torch.arange(100), torch.arange(100) % 4].sum()
    assert cost.gather(1, labels[:, None]).sum() < 0.9 * dealt


def test_cluster_by_shape_ignores_scale() -> None:
    x, _ = planted(4, 25, noise=4.0)
    scale = torch.rand(100, 1, generator=torch.Generator().manual_seed(3)) * 9 + 0.1
    by_shape = [cluster(y, 4, 25, seed=1, standardize=True) for y in (x, x * scale)]
    assert torch.equal(by_shape[0], by_shape[1])
    assert not torch.equal(cluster(x, 4, 25, seed=1), cluster(x * scale, 4, 25, seed=1))


def test_cluster_survives_identical_items() -> None:
    found = cluster(torch.ones(30, 4), 3, 10, seed=0)
    assert torch.bincount(found).tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="31 neurons are not 3 x 10"):
        cluster(torch.ones(31, 4), 3, 10, seed=0)


def test_choose_shared_takes_the_best_and_breaks_ties_by_index() -> None:
    scores = torch.tensor([1.0, 5.0, 1.0, 7.0, 1.0, 5.0])
    assert choose_shared(scores, 2).tolist() == [1, 3]
    assert choose_shared(scores, 4).tolist() == [0, 1, 3, 5]
    assert choose_shared(scores, 0).tolist() == []
    with pytest.raises(ValueError, match=r"size 7 is not in 0\.\.6"):
        choose_shared(scores, 7)


def test_partition_of_neurons() -> None:
    x, labels = planted(4, 10, noise=0.1)
    scores = torch.rand(44, generator=torch.Generator().manual_seed(1))
    shared = torch.tensor([3, 8, 20, 31])
    scores[shared] += 1
    features = torch.zeros(44, 24)
    rest = torch.tensor([i for i in range(44) if i not in shared])
    features[rest] = x
    partition = partition_neurons(scores, features, shared_size=4, num_experts=4, seed=0)
    assert (partition.shared_size, partition.expert_size, partition.num_experts) == (4, 10, 4)
    assert partition.shared.tolist() == shared.tolist()
    groups = {tuple(rest[labels == e].tolist()) for e in range(4)}
    assert {tuple(e.tolist()) for e in partition.expert_indices()} == groups


def test_partition_round_trips() -> None:
    partition = random_partition(torch.rand(20), shared_size=5, num_experts=3, seed=0)
    labels = partition.labels_F()
    again = build_partition(partition.shared, labels, 3)
    assert torch.equal(again.order_F, partition.order_F)
    restored = Partition.from_state(partition.state())
    assert torch.equal(restored.order_F, partition.order_F)
    assert restored.experts_EM.shape == (3, 5)
    turned = partition.permute_experts(torch.tensor([2, 0, 1]))
    assert torch.equal(turned.shared, partition.shared)
    for new, old in enumerate([2, 0, 1]):
        assert torch.equal(turned.experts_EM[new], partition.experts_EM[old])


def test_random_partition_depends_on_the_seed_only() -> None:
    scores = torch.arange(64.0)
    one, same, other = (
        random_partition(scores, shared_size=16, num_experts=4, seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(one.order_F, same.order_F)
    assert not torch.equal(one.order_F, other.order_F)
    assert one.shared.tolist() == other.shared.tolist() == list(range(48, 64))
    with pytest.raises(ValueError, match="47 neurons are not 4 equal experts"):
        random_partition(scores, shared_size=17, num_experts=4, seed=0)


def test_partition_checks_itself() -> None:
    order = torch.arange(10)
    with pytest.raises(ValueError, match="2 shared \\+ 3 x 3 neurons are not the 10"):
        Partition(order, 2, 3, 3)
    with pytest.raises(ValueError, match="not a permutation"):
        Partition(order.clamp_max(8), 1, 3, 3)
    with pytest.raises(ValueError, match="not int64"):
        Partition(order.float(), 1, 3, 3)
    with pytest.raises(ValueError, match=r"sizes \[4, 5\], not 2 equal"):
        build_partition(torch.tensor([0]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), 2)
