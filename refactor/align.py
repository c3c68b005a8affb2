"""Numbering the experts of all layers alike, so that one decision can serve every layer.

Experts of two layers match when the same tokens excite them: correlation of their output norms over
tokens. Shapes: T tokens, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fissile.refactor.partition import balanced_assign


def align_experts(norms_LTE: Sequence[Tensor], rounds: int = 10) -> list[Tensor]:
    """Permute the experts of every layer to agree best with the consensus of the others.

    Layers join one by one; afterwards each layer is matched again against all the others until no
    expert moves. The summed correlation never falls.

    Args:
        norms_LTE: output norms (T, E) of each layer on the same tokens.
        rounds: most passes over the layers.

    Returns:
        One int64 (E,) per layer for `Partition.permute_experts`: new expert e is old expert
        order[e]. The first layer that is matched, layer 0, starts in its own order.

    Raises:
        ValueError: no layers, or layers of different shapes.
    """
    if not norms_LTE or len({tuple(n.shape) for n in norms_LTE}) != 1:
        raise ValueError(f"norms of shapes {[tuple(n.shape) for n in norms_LTE]} cannot be aligned")
    profiles = [_standardise(norms) for norms in norms_LTE]
    experts = profiles[0].shape[1]
    orders = [torch.arange(experts, device=profiles[0].device) for _ in profiles]
    consensus_TE = profiles[0].clone()
    for layer in range(1, len(profiles)):
        orders[layer] = _match(consensus_TE, profiles[layer])
        consensus_TE += profiles[layer][:, orders[layer]]
    for _ in range(rounds):
        moved = False
        for layer, profile_TE in enumerate(profiles):
            others_TE = consensus_TE - profile_TE[:, orders[layer]]
            order = _match(others_TE, profile_TE)
            gain = (others_TE * (profile_TE[:, order] - profile_TE[:, orders[layer]])).sum()
            if gain > 1e-9 * len(profile_TE):  # ties would otherwise swap for ever
                orders[layer], moved = order, True
                consensus_TE = others_TE + profile_TE[:, order]
        if not moved:
            break
    return orders


def agreement(norms_LTE: Sequence[Tensor], orders: Sequence[Tensor]) -> float:
    """Mean correlation of equally numbered experts over all pairs of layers; 0 for one layer."""
    layers = len(norms_LTE)
    if layers < 2:
        return 0.0
    aligned = [_standardise(n)[:, order] for n, order in zip(norms_LTE, orders, strict=True)]
    total_TE = torch.stack(aligned).sum(0)
    own = sum(float(a.square().sum()) for a in aligned)
    pairs = layers * (layers - 1) * aligned[0].numel()
    return (float(total_TE.square().sum()) - own) / pairs


def _match(consensus_TE: Tensor, profile_TE: Tensor) -> Tensor:
    """Order of the profile's experts that maximises the summed product with the consensus."""
    cost_EE = -(consensus_TE.T @ profile_TE) / len(profile_TE)
    return balanced_assign(cost_EE, 1)


def _standardise(norms_TE: Tensor) -> Tensor:
    """Deviation from the token's mean, in units of each expert's standard deviation."""
    x = norms_TE.double()
    x = x - x.mean(1, keepdim=True)
    x = x - x.mean(0)
    return x / x.square().mean(0).sqrt().clamp_min(1e-12)
