"""How much the choices of one layer's router tell about another's (Read-ME, section 2).

Entropies are in bits, over sets of chosen experts. Plug-in estimates are biased upwards when the
tables are large and the tokens few, so a corrected and a shuffled estimate stand beside them.
Shapes: T tokens, K chosen experts, L layers, A / B / J distinct sets of a, of b, and pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Redundancy:
    """What the choices of layer a tell about those of layer b.

    Args:
        entropy_a: H(a), bits.
        entropy_b: H(b), bits.
        conditional: H(b | a), bits.
        information: I(a; b), bits, plug-in estimate.
        corrected: I(a; b) with Miller-Madow corrected entropies, not below 0.
        shuffled: I(a; b) when the tokens of b are shuffled: the size of the bias.
        normalised: `corrected` over the smaller entropy, 0..1; 0 where a layer never changes.
        predictable: share of tokens for which the most likely set given a is right.
    """

    entropy_a: float
    entropy_b: float
    conditional: float
    information: float
    corrected: float
    shuffled: float
    normalised: float
    predictable: float


def route_information(
    a_TK: Tensor, b_TK: Tensor, *, seed: int = 0, shuffles: int = 5
) -> Redundancy:
    """Mutual information of two layers' chosen sets.

    Args:
        a_TK: int64 (T, K), choices of one layer; the order within a token does not matter.
        b_TK: int64 (T, K'), choices of the other layer for the same tokens.
        seed: of the shuffled baseline.
        shuffles: how many shuffles are averaged.

    Raises:
        ValueError: no tokens, or different numbers of them.
    """
    if len(a_TK) != len(b_TK) or not len(a_TK):
        raise ValueError(f"choices of {len(a_TK)} and {len(b_TK)} tokens cannot be compared")
    a_T, b_T = _set_ids(a_TK), _set_ids(b_TK)
    count_A, count_B = torch.bincount(a_T), torch.bincount(b_T)
    first_J, count_J = _joint(a_T, b_T)
    h_a, h_b, h_ab = _entropy(count_A), _entropy(count_B), _entropy(count_J)
    # Miller-Madow adds (support - 1) / 2T nats to each entropy.
    support = len(count_A) + len(count_B) - len(count_J) - 1
    bias = support / (2 * len(a_T) * math.log(2))
    likeliest_A = torch.zeros_like(count_A).scatter_reduce_(0, first_J, count_J, "amax")
    information = max(0.0, h_a + h_b - h_ab)
    corrected = min(max(0.0, information + bias), h_a, h_b)
    smaller = min(h_a, h_b)
    return Redundancy(
        entropy_a=h_a,
        entropy_b=h_b,
        conditional=max(0.0, h_ab - h_a),
        information=information,
        corrected=corrected,
        shuffled=_shuffled(a_T, b_T, h_a + h_b, seed, shuffles),
        normalised=corrected / smaller if smaller > 1e-12 else 0.0,
        predictable=float(likeliest_A.sum() / len(a_T)),
    )


def layer_redundancy(choices: Sequence[Tensor], seed: int = 0) -> list[Redundancy]:
    """`route_information` of every two neighbouring layers, L - 1 entries."""
    return [route_information(a, b, seed=seed) for a, b in itertools.pairwise(choices)]


def _set_ids(index_TK: Tensor) -> Tensor:
    """One small integer per distinct set."""
    if int(index_TK.max()) < 63:  # a bit per expert: sorting numbers is much faster than rows
        return torch.unique((1 << index_TK).sum(1), return_inverse=True)[1]
    return torch.unique(index_TK.sort(1).values, dim=0, return_inverse=True)[1]


def _joint(a_T: Tensor, b_T: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (a, b) that occur: id of a, and count. Sparse: sets can be as many as tokens."""
    columns = int(b_T.max()) + 1
    pair_J, count_J = torch.unique(a_T * columns + b_T, return_counts=True)
    return pair_J // columns, count_J


def _entropy(counts: Tensor) -> float:
    p = counts.double() / counts.sum()
    return float(torch.special.entr(p).sum() / math.log(2))


def _shuffled(a_T: Tensor, b_T: Tensor, h_sum: float, seed: int, shuffles: int) -> float:
    rng = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(shuffles):
        order = torch.randperm(len(b_T), generator=rng).to(b_T.device)
        total += h_sum - _entropy(_joint(a_T, b_T[order])[1])
    return max(0.0, total / max(shuffles, 1))
