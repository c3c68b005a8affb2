"""Exact solver of the transportation problem: N items into K clusters of given capacities.

Two phases. Prices: ascent on the dual, where every item takes the cluster of lowest cost + price,
brings the cluster sizes near the capacity. Repair: an assignment that is cheapest at some prices is
optimal for its own sizes, and successive shortest paths from over-full to under-full clusters keep
it so until every cluster is full (Ahuja, Magnanti and Orlin, Network Flows, section 9.7). The
residual graph has only the K clusters as nodes: edge a -> b is the cheapest move of one item.

Shapes: N items, K clusters.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_PRICE_STEPS = 150


def transport(
    cost_NK: Floats, capacity_K: Ints, prices_K: Floats | None = None
) -> tuple[Ints, Floats]:
    """Assign every item so that each cluster is full and the total cost is the lowest.

    Args:
        cost_NK: float64 (N, K), finite.
        capacity_K: int64 (K,), items per cluster; they add up to N.
        prices_K: prices of a similar problem to start from.

    Returns:
        Cluster of each item, int64 (N,), and the prices (K,) for the next similar problem.

    Raises:
        ValueError: the capacities do not add up to N, or a cost is not finite.
    """
    if cost_NK.shape != (capacity_K.sum(), len(capacity_K)) or (capacity_K < 0).any():
        raise ValueError(f"cost {cost_NK.shape} cannot fill clusters of {capacity_K.tolist()}")
    if not np.isfinite(cost_NK).all():
        raise ValueError("costs hold NaN or infinite values")
    if cost_NK.size == 0:
        return np.zeros(len(cost_NK), dtype=np.int64), np.zeros(cost_NK.shape[1])
    labels_N, prices_K = _price(cost_NK, capacity_K, prices_K)
    return _Repair(cost_NK, labels_N, capacity_K).run(), prices_K


def _price(cost_NK: Floats, capacity_K: Ints, start_K: Floats | None) -> tuple[Ints, Floats]:
    """Raise the prices of over-full clusters; return the best-balanced assignment seen.

    Every price has its own step, grown while it keeps its direction and halved when it turns: costs
    span orders of magnitude, and no single step suits all clusters.
    """
    clusters = cost_NK.shape[1]
    prices_K = _start(cost_NK, capacity_K, start_K)
    direction_K, step_K = np.zeros(clusters), np.full(clusters, _first_step(cost_NK + prices_K))
    fewest, labels_N, found_K = len(cost_NK) + 1, np.zeros(0, dtype=np.int64), prices_K
    for _ in range(_PRICE_STEPS):
        trial_N = (cost_NK + prices_K).argmin(1)
        over_K = np.bincount(trial_N, minlength=clusters) - capacity_K
        excess = int(np.maximum(over_K, 0).sum())
        if excess < fewest:
            fewest, labels_N, found_K = excess, trial_N, prices_K
        if excess <= clusters // 4:  # the repair is quicker from here
            break
        turned = np.sign(over_K) * direction_K
        step_K = step_K * np.where(turned > 0, 1.3, np.where(turned < 0, 0.5, 1.0))
        direction_K = np.sign(over_K)
        prices_K = prices_K + step_K * np.clip(over_K / np.maximum(capacity_K, 1), -1, 1)
    return labels_N, found_K


def _start(cost_NK: Floats, capacity_K: Ints, warm_K: Floats | None) -> Floats:
    """The better balanced of the given prices and prices at which every cluster is as attractive
    to as many of its best items as it can hold as any other."""
    relative_NK = cost_NK - cost_NK.mean(1, keepdims=True)
    last_K = np.maximum(capacity_K, 1) - 1
    ranked_NK = np.partition(relative_NK, np.unique(last_K), axis=0)
    cold_K = -ranked_NK[last_K, np.arange(len(last_K))]
    if warm_K is None:
        return cold_K
    excess = [
        np.maximum(np.bincount(c.argmin(1), minlength=len(cold_K)) - capacity_K, 0).sum()
        for c in (cost_NK + warm_K, cost_NK + cold_K)
    ]
    return warm_K if excess[0] <= excess[1] else cold_K


def _first_step(cost_NK: Floats) -> float:
    """A tenth of the typical gap between an item's best and second best cluster."""
    if cost_NK.shape[1] < 2:
        return 0.0
    two_N2 = np.partition(cost_NK, 1, axis=1)[:, :2]
    gap_N = two_N2[:, 1] - two_N2[:, 0]
    return 0.1 * float(np.median(gap_N) or gap_N.mean())


class _Repair:
    """Successive shortest paths on the K-node residual graph."""

    def __init__(self, cost_NK: Floats, labels_N: Ints, capacity_K: Ints) -> None:
        self.cost, self.labels, self.capacity = cost_NK, labels_N, capacity_K
        clusters = cost_NK.shape[1]
        self.count = np.bincount(labels_N, minlength=clusters)
        # Ties must not send the search around a cycle whose length is rounding error.
        self.tolerance = 1e-12 * (float(np.ptp(cost_NK)) or 1.0)
        self.move = np.full((clusters, clusters), np.inf)
        for a in range(clusters):
            self._update(a)

    def run(self) -> Ints:
        while (self.count > self.capacity).any():
            self._augment(self._shortest_path())
        return self.labels

    def _update(self, a: int) -> None:
        """Refresh the cheapest moves out of cluster `a`."""
        members = np.flatnonzero(self.labels == a)
        if len(members):
            self.move[a] = (self.cost[members] - self.cost[members, a, None]).min(0)
        else:
            self.move[a] = np.inf
        self.move[a, a] = 0.0

    def _shortest_path(self) -> list[int]:
        """Bellman-Ford from all over-full clusters to the nearest under-full one."""
        clusters = len(self.count)
        distance = np.where(self.count > self.capacity, 0.0, np.inf)
        before = np.full(clusters, -1)
        for _ in range(clusters):
            through = distance[:, None] + self.move
            via = through.argmin(0)
            reach = through[via, np.arange(clusters)]
            better = reach < distance - self.tolerance
            if not better.any():
                break
            distance = np.where(better, reach, distance)
            before = np.where(better, via, before)
        target = int(np.where(self.count < self.capacity, distance, np.inf).argmin())
        path = [target]
        while (last := int(before[path[-1]])) >= 0:
            if last in path:  # a cycle of negative length, see `_augment`
                return [*path[path.index(last) :], last][::-1]
            path.append(last)
        return path[::-1]

    def _augment(self, path: list[int]) -> None:
        """Move items along the path: as many as are tied for every edge's cheapest move.

        Where costs differ by no more than the tolerance, ties add up and can leave an assignment
        that a cycle of moves makes cheaper. One item goes around it, and the search begins again.
        """
        cycle = path[0] == path[-1]
        room = min(
            self.count[path[0]] - self.capacity[path[0]],
            self.capacity[path[-1]] - self.count[path[-1]],
        )
        chosen = []
        for a, b in itertools.pairwise(path):
            members = np.flatnonzero(self.labels == a)
            price = self.cost[members, b] - self.cost[members, a]
            tied = members[price <= self.move[a, b] + self.tolerance]
            if cycle:
                tied = members[price.argmin(keepdims=True)]
            room = 1 if cycle else min(room, len(tied))
            chosen.append(tied)
        for tied, b in zip(chosen, path[1:], strict=True):
            self.labels[tied[:room]] = b
        self.count[path[0]] -= room
        self.count[path[-1]] += room
        for a in path:
            self._update(a)
