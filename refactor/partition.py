"""Splitting the neurons of a layer into shared neurons and balanced routed experts.

Shapes: F FFN width, S shared neurons, E routed experts, M neurons per expert, N items to assign,
K clusters, Q feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fissile.refactor.transport import transport


@dataclass(frozen=True, eq=False)
class Partition:
    """A permutation of the neurons to [shared | expert 0 | ... | expert E-1].

    Args:
        order_F: int64 (F,), permutation of 0..F-1; place p holds original neuron order_F[p].
        shared_size: S.
        expert_size: M.
        num_experts: E; S + E * M = F.

    Raises:
        ValueError: the sizes do not add up, or `order_F` is no permutation.
    """

    order_F: Tensor
    shared_size: int
    expert_size: int
    num_experts: int

    def __post_init__(self) -> None:
        width = self.order_F.numel()
        if min(self.shared_size, self.expert_size, self.num_experts) < 0:
            raise ValueError("a partition has no negative sizes")
        if self.shared_size + self.num_experts * self.expert_size != width:
            raise ValueError(
                f"{self.shared_size} shared + {self.num_experts} x {self.expert_size} neurons "
                f"are not the {width} of the layer"
            )
        if self.order_F.dtype != torch.int64 or self.order_F.shape != (width,):
            raise ValueError(
                f"order is {self.order_F.dtype} {tuple(self.order_F.shape)}, not int64 (F,)"
            )
        everyone = torch.arange(width, device=self.order_F.device)
        if not torch.equal(self.order_F.sort().values, everyone):
            raise ValueError(f"order is not a permutation of 0..{width - 1}")

    @property
    def shared(self) -> Tensor:
        """Original indices of the shared neurons, int64 (S,)."""
        return self.order_F[: self.shared_size]

    @property
    def experts_EM(self) -> Tensor:
        """Original indices of each expert's neurons, int64 (E, M)."""
        return self.order_F[self.shared_size :].view(self.num_experts, self.expert_size)

    def expert_indices(self) -> list[Tensor]:
        """Original indices of each expert's neurons, one int64 tensor an expert."""
        return list(self.experts_EM)

    def labels_F(self) -> Tensor:
        """Expert of each original neuron, -1 where shared, int64 (F,)."""
        places = torch.arange(self.num_experts, device=self.order_F.device)
        labels = torch.full_like(self.order_F, -1)
        labels[self.order_F[self.shared_size :]] = places.repeat_interleave(self.expert_size)
        return labels

    def permute_experts(self, order_E: Tensor) -> Partition:
        """The same experts in another order: new expert e is old expert order_E[e]."""
        routed = self.experts_EM[order_E].flatten()
        order = torch.cat([self.shared, routed])
        return Partition(order, self.shared_size, self.expert_size, self.num_experts)

    def state(self) -> dict[str, Tensor]:
        """The partition as tensors, for a journal."""
        sizes = torch.tensor([self.shared_size, self.expert_size, self.num_experts])
        return {"order_F": self.order_F, "sizes": sizes}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Partition:
        """Inverse of `state`."""
        return cls(state["order_F"], *state["sizes"].tolist())


def choose_shared(scores_F: Tensor, size: int) -> Tensor:
    """The `size` neurons of highest score, ties to the lower index.

    Args:
        scores_F: (F,) importance of each neuron.
        size: S, 0..F.

    Returns:
        int64 (S,), ascending.
    """
    if not 0 <= size <= len(scores_F):
        raise ValueError(f"size {size} is not in 0..{len(scores_F)}")
    best = torch.sort(scores_F, descending=True, stable=True).indices[:size]
    return best.sort().values


def balanced_assign(cost_NK: Tensor, capacity: int | Tensor) -> Tensor:
    """Assign N items to K clusters of fixed sizes at the lowest total cost.

    A transportation problem, solved exactly: capacity prices come near, shortest augmenting paths
    over the K clusters finish. Never an N x N assignment.

    Args:
        cost_NK: cost of each item in each cluster (N, K), finite.
        capacity: items per cluster, one number or int64 (K,).

    Returns:
        int64 (N,), cluster of each item.

    Raises:
        ValueError: the capacities do not add up to N, or a cost is not finite.
    """
    size_K = torch.as_tensor(capacity, dtype=torch.int64).expand(cost_NK.shape[1])
    labels, _ = transport(cost_NK.double().cpu().numpy(), size_K.cpu().numpy())
    return torch.from_numpy(labels).to(cost_NK.device)


def cluster(
    features_NQ: Tensor,
    num_experts: int,
    size: int,
    *,
    seed: int,
    iterations: int = 20,
    standardize: bool = False,
) -> Tensor:
    """Capacitated k-means: clusters of exactly `size` items, k-means++ seeds.

    Args:
        features_NQ: one row an item (N, Q); N = num_experts * size.
        num_experts: E, number of clusters.
        size: M, items per cluster.
        seed: of the k-means++ draw.
        iterations: most rounds; stops when no item moves.
        standardize: scale every row to unit norm, so that profiles are compared by shape.

    Returns:
        int64 (N,), cluster of each item.

    Raises:
        ValueError: sizes do not fit, or a feature is not finite.
    """
    if num_experts < 1 or len(features_NQ) != num_experts * size:
        raise ValueError(f"{len(features_NQ)} neurons are not {num_experts} x {size}")
    x_NQ = features_NQ.double().cpu()
    if standardize:
        x_NQ = torch.nn.functional.normalize(x_NQ, dim=1)
    centre_EQ = _spread_seeds(x_NQ, num_experts, seed)
    labels, prices, sizes = None, None, np.full(num_experts, size)
    for _ in range(max(1, iterations)):
        # Of ||x - c||^2, what depends on x or c alone adds the same to every balanced assignment.
        cost_NE = -2 * x_NQ @ centre_EQ.T
        found, prices = transport(cost_NE.numpy(), sizes, prices)
        new = torch.from_numpy(found)
        if labels is not None and torch.equal(new, labels):
            break
        labels = new
        centre_EQ = x_NQ[labels.argsort(stable=True)].view(num_experts, size, -1).mean(1)
    assert labels is not None
    return labels.to(features_NQ.device)


def _spread_seeds(x_NQ: Tensor, count: int, seed: int) -> Tensor:
    """k-means++: each next centre is an item drawn in proportion to its squared distance."""
    rng = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x_NQ), (1,), generator=rng))]
    gap_N = torch.full((len(x_NQ),), torch.inf, dtype=x_NQ.dtype)
    while len(chosen) < count:
        gap_N = torch.minimum(gap_N, (x_NQ - x_NQ[chosen[-1]]).square().sum(1))
        gap_N[chosen[-1]] = 0
        drawable = gap_N if gap_N.sum() > 0 else torch.ones_like(gap_N)
        chosen.append(int(torch.multinomial(drawable, 1, generator=rng)))
    return x_NQ[chosen]


def build_partition(shared_S: Tensor, labels_F: Tensor, num_experts: int) -> Partition:
    """Put shared neurons first and each expert's neurons in ascending order after them.

    Args:
        shared_S: int64 (S,), original indices of the shared neurons.
        labels_F: int64 (F,), expert of each neuron; ignored where shared.
        num_experts: E.

    Raises:
        ValueError: the experts are not of one size.
    """
    labels = labels_F.clone()
    labels[shared_S] = -1
    order = torch.sort(labels, stable=True).indices
    sizes = torch.bincount(labels[labels >= 0], minlength=num_experts)
    if len(sizes) != num_experts or bool((sizes != sizes[0]).any()):
        raise ValueError(f"experts have sizes {sizes.tolist()}, not {num_experts} equal ones")
    return Partition(order, len(shared_S), int(sizes[0]), num_experts)


def partition_neurons(
    scores_F: Tensor,
    features_FQ: Tensor,
    *,
    shared_size: int,
    num_experts: int,
    seed: int,
    standardize: bool = False,
) -> Partition:
    """Share the neurons of highest score, cluster the rest into balanced experts.

    Args:
        scores_F: (F,) importance of each neuron.
        features_FQ: (F, Q) profiles that neurons of one expert should have in common.
        shared_size: S; F - S must be a multiple of `num_experts`.
        num_experts: E.
        seed: of the clustering.
        standardize: see `cluster`.
    """
    shared = choose_shared(scores_F, shared_size)
    routed = torch.ones(len(scores_F), dtype=torch.bool, device=scores_F.device)
    routed[shared] = False
    size = (len(scores_F) - shared_size) // num_experts
    labels = torch.full((len(scores_F),), -1, dtype=torch.int64, device=scores_F.device)
    labels[routed] = cluster(
        features_FQ[routed], num_experts, size, seed=seed, standardize=standardize
    )
    return build_partition(shared, labels, num_experts)


def random_partition(
    scores_F: Tensor, *, shared_size: int, num_experts: int, seed: int
) -> Partition:
    """The control: the same shared neurons, the others dealt to the experts at random."""
    shared = choose_shared(scores_F, shared_size)
    rest, left = divmod(len(scores_F) - shared_size, num_experts)
    if left:
        raise ValueError(
            f"{len(scores_F) - shared_size} neurons are not {num_experts} equal experts"
        )
    routed = torch.ones(len(scores_F), dtype=torch.bool)
    routed[shared.cpu()] = False
    rng = torch.Generator().manual_seed(seed)
    dealt = torch.arange(num_experts).repeat_interleave(rest)
    labels = torch.full((len(scores_F),), -1, dtype=torch.int64)
    labels[routed] = dealt[torch.randperm(len(dealt), generator=rng)]
    return build_partition(shared, labels.to(scores_F.device), num_experts)
