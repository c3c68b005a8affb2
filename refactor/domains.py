"""Overlapping domain experts as Read-ME extracts them (section 3.1), stored without duplication.

Every domain keeps the neurons it excites most. Neurons kept by all domains are permanent; the
others are laid out as blocks of equal membership, so that each expert is a few contiguous slices of
one weight set.
Shapes: F FFN width, N domains (one expert each), S permanent neurons, P kept neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MembershipPartition:
    """The kept neurons of a layer as [permanent | blocks of equal membership].

    Args:
        order_P: int64 (P,), original indices, all different; the F - P others are dropped.
        shared_size: S, permanent neurons, first in `order_P`.
        blocks: (size, ids of the experts that hold the block), in the order of `order_P[S:]`.
        num_experts: N.

    Raises:
        ValueError: sizes do not add up, an index repeats, or a block names no or unknown experts.
    """

    order_P: Tensor
    shared_size: int
    blocks: tuple[tuple[int, tuple[int, ...]], ...]
    num_experts: int

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.blocks]
        if self.shared_size < 0 or min(sizes, default=1) < 1:
            raise ValueError("a membership block has at least one neuron")
        if self.shared_size + sum(sizes) != self.order_P.numel():
            raise ValueError(
                f"{self.shared_size} permanent neurons and blocks of {sizes} are not the "
                f"{self.order_P.numel()} kept ones"
            )
        if self.order_P.dtype != torch.int64 or len(self.order_P.unique()) != len(self.order_P):
            raise ValueError("order must hold distinct int64 indices")
        for _, members in self.blocks:
            if not members or not set(members) <= set(range(self.num_experts)):
                raise ValueError(f"block of experts {members}: known are 0..{self.num_experts - 1}")

    @property
    def shared(self) -> Tensor:
        """Original indices of the permanent neurons, int64 (S,)."""
        return self.order_P[: self.shared_size]

    @property
    def pool(self) -> Tensor:
        """Original indices of the neurons in blocks, int64 (P - S,)."""
        return self.order_P[self.shared_size :]

    def expert_indices(self) -> list[Tensor]:
        """Original indices of each expert's own neurons, permanent ones excluded."""
        parts = self.pool.split([size for size, _ in self.blocks])
        pairs = list(zip(parts, self.blocks, strict=True))
        return [
            torch.cat([self.pool[:0], *(part for part, (_, ids) in pairs if e in ids)])
            for e in range(self.num_experts)
        ]

    def state(self) -> dict[str, Tensor]:
        """The partition as tensors, for a journal."""
        experts = range(self.num_experts)
        rows = [[size, *(int(e in ids) for e in experts)] for size, ids in self.blocks]
        blocks = torch.tensor(rows, dtype=torch.int64).reshape(-1, 1 + self.num_experts)
        return {"order_P": self.order_P, "shared": torch.tensor(self.shared_size), "blocks": blocks}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> MembershipPartition:
        """Inverse of `state`."""
        blocks = tuple(
            (row[0], tuple(e for e, member in enumerate(row[1:]) if member))
            for row in state["blocks"].tolist()
        )
        experts = state["blocks"].shape[1] - 1
        return cls(state["order_P"], int(state["shared"]), blocks, experts)


@dataclass(frozen=True, eq=False)
class Overlap:
    """How much the domains' neuron sets have in common.

    Args:
        jaccard_NN: |A and B| / |A or B| of every two domains, float64.
        permanent: neurons that all domains keep.
        union: neurons that any domain keeps.
        width: F.
    """

    jaccard_NN: Tensor
    permanent: int
    union: int
    width: int


def domain_masks(score_NF: Tensor, size: int) -> Tensor:
    """Mark exactly `size` neurons of highest score for every domain, ties to the lower index.

    Args:
        score_NF: of neurons per domain (N, F), e.g. E|h|.
        size: neurons that each domain keeps, 1..F.

    Returns:
        bool (N, F).
    """
    width = score_NF.shape[1]
    if not 1 <= size <= width:
        raise ValueError(f"size {size} is not in 1..{width}")
    best = torch.sort(score_NF, dim=1, descending=True, stable=True).indices[:, :size]
    return torch.zeros_like(score_NF, dtype=torch.bool).scatter_(1, best, True)


def membership_partition(keep_NF: Tensor) -> MembershipPartition:
    """Lay out masks as permanent neurons and membership blocks.

    Blocks follow each other in reflected Gray code of their membership: neighbours then differ in
    few experts, and each expert falls into about half as many runs as in binary order.

    Args:
        keep_NF: bool (N, F), at most 62 domains.
    """
    domains = len(keep_NF)
    if not 1 <= domains <= 62:
        raise ValueError(f"{domains} domains are not in 1..62")
    bits = 1 << torch.arange(domains, device=keep_NF.device)
    code_F = (keep_NF.long() * bits[:, None]).sum(0)
    rank_F, shift = code_F.clone(), 1
    while shift < domains:  # inverse of the Gray code: prefix xor of the bits
        rank_F ^= rank_F >> shift
        shift *= 2
    everyone = (1 << domains) - 1
    shared = torch.nonzero(code_F == everyone).flatten()
    routed = torch.nonzero((code_F > 0) & (code_F < everyone)).flatten()
    routed = routed[torch.sort(rank_F[routed], stable=True).indices]
    codes, sizes = torch.unique_consecutive(code_F[routed], return_counts=True)
    blocks = tuple(
        (size, tuple(e for e in range(domains) if code >> e & 1))
        for code, size in zip(codes.tolist(), sizes.tolist(), strict=True)
    )
    return MembershipPartition(torch.cat([shared, routed]), len(shared), blocks, domains)


def overlap(keep_NF: Tensor) -> Overlap:
    """Jaccard similarity of every two domains, size of the permanent part and of the union.

    Args:
        keep_NF: bool (N, F).
    """
    keep = keep_NF.double()
    both_NN = keep @ keep.T
    size_N = keep.sum(1)
    either_NN = size_N[:, None] + size_N - both_NN
    return Overlap(
        both_NN / either_NN.clamp_min(1),
        int(keep_NF.all(0).sum()),
        int(keep_NF.any(0).sum()),
        keep_NF.shape[1],
    )
