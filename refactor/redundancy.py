"""How much the choices of one layer's router tell about another's (Read-ME, section 2).

Entropies are in bits, over sets of chosen experts. Plug-in estimates are biased upwards when the
tables are large and the tokens few, so a corrected and a shuffled estimate stand beside them.
Choices are int64 (T, K), distinct within a token, -1 where fewer than K were chosen.
Shapes: T tokens, K chosen experts, L layers, A / B / J distinct sets of a, of b, and pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
        adjusted: share of what could lie above the shuffled estimate that does, at most 1; 0 where
            the tables are so large that shuffled tokens seem to tell everything too.
        normalised: `corrected` over the smaller entropy, 0..1; 0 where a layer never changes.
        predictable: share of tokens for which the most likely set given a is right.
    """

    entropy_a: float
    entropy_b: float
    conditional: float
    information: float
    corrected: float
    shuffled: float
    adjusted: float
    normalised: float
    predictable: float


def route_information(
    a_TK: Tensor, b_TK: Tensor, *, seed: int = 0, shuffles: int = 5
) -> Redundancy:
    """Mutual information of two layers' chosen sets.

    "adjusted" is the adjusted mutual information of Vinh, Epps and Bailey (2010) over the smaller
    entropy, its expectation by shuffling.

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
    shuffled = _shuffled(a_T, b_T, h_a + h_b, seed, shuffles)
    return Redundancy(
        entropy_a=h_a,
        entropy_b=h_b,
        conditional=max(0.0, h_ab - h_a),
        information=information,
        corrected=corrected,
        shuffled=shuffled,
        adjusted=max(0.0, information - shuffled) / max(smaller - shuffled, 0.05 * smaller, 1e-12),
        normalised=corrected / smaller if smaller > 1e-12 else 0.0,
        predictable=float(likeliest_A.sum() / len(a_T)),
    )


def layer_redundancy(choices: Sequence[Tensor], seed: int = 0) -> list[Redundancy]:
    """`route_information` of every two neighbouring layers, L - 1 entries."""
    return [route_information(a, b, seed=seed) for a, b in itertools.pairwise(choices)]


@dataclass(frozen=True)
class Transitions:
    """P(set of layer b | set of layer a) over the most common sets (Read-ME, figure 2a).

    Args:
        rows: experts of each set of layer a, most common first.
        columns: experts of each set of layer b, most common first.
        share: of the tokens, per row.
        probability: row by column; a row sums to less than 1 where b chose a set not shown.
    """

    rows: list[list[int]]
    columns: list[list[int]]
    share: list[float]
    probability: list[list[float]]


def transition_matrix(a_TK: Tensor, b_TK: Tensor, most: int = 12) -> Transitions:
    """How often each common set of layer b follows each common set of layer a.

    Args:
        a_TK: int64 (T, K), choices of the earlier layer.
        b_TK: int64 (T, K'), choices of the later layer for the same tokens.
        most: rows and columns at most; ties go to the set with the lower experts.

    Raises:
        ValueError: no tokens, or different numbers of them.
    """
    if len(a_TK) != len(b_TK) or not len(a_TK):
        raise ValueError(f"choices of {len(a_TK)} and {len(b_TK)} tokens cannot be compared")
    a_T, b_T = _set_ids(a_TK), _set_ids(b_TK)
    (rows, of_row), (columns, of_column) = _common(a_TK, a_T, most), _common(b_TK, b_T, most)
    joint = torch.zeros(len(rows) + 1, len(columns) + 1, dtype=torch.float64)
    joint.index_put_((of_row[a_T], of_column[b_T]), torch.ones(len(a_T)).double(), accumulate=True)
    count = joint.sum(1)[:-1]
    probability = joint[:-1, :-1] / count[:, None]
    return Transitions(rows, columns, (count / len(a_T)).tolist(), probability.tolist())


@dataclass(frozen=True)
class Locality:
    """How long the choices of one layer last along a text.

    Args:
        switch_rate: share of tokens whose set differs from that of the token before, in the same
            sequence; None without neighbours, like all that follows.
        kept: share of the previous token's experts that are chosen again, mean.
        chance: share of all pairs of tokens with the same set: what `1 - switch_rate` would be if
            order did not matter.
        repeat_distance: tokens since the same set was chosen last in the sequence, mean over the
            tokens for which it was chosen before.
        new: share of tokens whose set is new in their sequence.
        same: share of tokens with the set of the token 1, 2, 4, ... places before.
    """

    switch_rate: float | None
    kept: float | None
    chance: float
    repeat_distance: float | None
    new: float
    same: list[float | None]


DISTANCES = (1, 2, 4, 8, 16, 32, 64)
"""Distances of `Locality.same`."""


def temporal_locality(index_TK: Tensor, sequence_T: Tensor) -> Locality:
    """Persistence of one layer's choices from token to token.

    Args:
        index_TK: int64 (T, K), choices of the layer, tokens in reading order.
        sequence_T: int64 (T,), which sequence a token belongs to; each is one run of tokens.

    Raises:
        ValueError: no tokens, or as many labels as not tokens.
    """
    if len(index_TK) != len(sequence_T) or not len(index_TK):
        raise ValueError(f"{len(index_TK)} choices and {len(sequence_T)} sequence labels")
    set_T = _set_ids(index_TK)
    share = torch.bincount(set_T).double() / len(set_T)
    same = [_mean(set_T[d:] == set_T[:-d], sequence_T, d) for d in DISTANCES]
    kept_T = (index_TK[1:, :, None] == index_TK[:-1, None, :]) & (index_TK[:-1, None, :] >= 0)
    chosen_T = (index_TK[:-1] >= 0).sum(1).clamp_min(1)
    gap_T = _repeats(set_T, sequence_T)
    again = gap_T > 0
    return Locality(
        switch_rate=None if same[0] is None else 1 - same[0],
        kept=_mean(kept_T.any(1).sum(1) / chosen_T, sequence_T, 1),
        chance=float(share.square().sum()),
        repeat_distance=float(gap_T[again].double().mean()) if bool(again.any()) else None,
        new=float((~again).double().mean()),
        same=same,
    )


def routing_redundancy(
    choices: Sequence[Tensor],
    sequence_T: Tensor,
    *,
    num_experts: int,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    most: int = 12,
) -> dict[str, Any]:
    """Everything that Read-ME's section 2 asks of a router, as JSON.

    Args:
        choices: int64 (T, K) per layer that decides; one entry where one decision serves all.
        sequence_T: int64 (T,), which sequence a token belongs to.
        num_experts: E.
        layers: numbers of those layers in the model; by default 0, 1, ...
        seed: of the shuffled baselines.
        most: sets shown in a transition matrix.

    Returns:
        "tokens", "sequences", "num_experts", "top_k" (mean chosen), "layers" (entropy and locality
        of each), "pairs" (information between neighbours; "first" is that of the first of each
        token's experts alone, whose tables stay small where there are many sets) and "transitions"
        (of the last pair and of the one that shares most); the fields are those of `Redundancy`,
        `Locality` and `Transitions`.

    Raises:
        ValueError: no layers, no tokens, or numbers of tokens that differ.
    """
    if not choices:
        raise ValueError("no layer chooses experts")
    numbers = list(range(len(choices)) if layers is None else layers)
    rows = [
        {"layer": number, **_layer_row(index_TK, sequence_T, num_experts)}
        for number, index_TK in zip(numbers, choices, strict=True)
    ]
    found = layer_redundancy(choices, seed=seed)
    first = layer_redundancy([index_TK[:, :1] for index_TK in choices], seed=seed)
    pairs = [
        {"earlier": a, "later": b, **asdict(pair), "first": asdict(alone)}
        for (a, b), pair, alone in zip(itertools.pairwise(numbers), found, first, strict=True)
    ]
    shown = {len(found) - 1, max(range(len(found)), key=lambda i: found[i].adjusted, default=-1)}
    transitions = [
        {"earlier": numbers[i], "later": numbers[i + 1]}
        | asdict(transition_matrix(choices[i], choices[i + 1], most))
        for i in sorted(shown)
        if i >= 0
    ]
    chosen = sum(float((c >= 0).sum(1).double().mean()) for c in choices) / len(choices)
    return {
        "tokens": len(sequence_T),
        "sequences": len(sequence_T.unique()),
        "num_experts": num_experts,
        "top_k": chosen,
        "layers": rows,
        "pairs": pairs,
        "transitions": transitions,
    }


def _layer_row(index_TK: Tensor, sequence_T: Tensor, num_experts: int) -> dict[str, Any]:
    """Sets, load and locality of one layer's choices."""
    count = torch.bincount(_set_ids(index_TK))
    load = torch.bincount(index_TK[index_TK >= 0], minlength=num_experts).double()
    return {
        "sets": len(count),
        "entropy": _entropy(count),
        "most_common": float(count.max() / len(index_TK)),
        "imbalance": float(load.max() * num_experts / load.sum()),
        **asdict(temporal_locality(index_TK, sequence_T)),
    }


def _set_ids(index_TK: Tensor) -> Tensor:
    """One small integer per distinct set."""
    sorted_TK = index_TK.sort(1).values
    base, places = int(index_TK.max()) + 2, index_TK.shape[1]
    if places * math.log2(base) < 63:  # sets as numbers: sorting those is much faster than rows
        place_K = torch.tensor([base**k for k in range(places)], device=index_TK.device)
        return torch.unique(((sorted_TK + 1) * place_K).sum(1), return_inverse=True)[1]
    return torch.unique(sorted_TK, dim=0, return_inverse=True)[1]


def _common(index_TK: Tensor, set_T: Tensor, most: int) -> tuple[list[list[int]], Tensor]:
    """Experts of the most common sets, and the place of every set among them, last if it is not."""
    count = torch.bincount(set_T)
    best = torch.sort(count, descending=True, stable=True).indices[:most]
    first = torch.full_like(count, len(set_T)).scatter_reduce_(
        0, set_T, torch.arange(len(set_T), device=set_T.device), "amin"
    )
    names = [sorted(e for e in row if e >= 0) for row in index_TK[first[best]].tolist()]
    place = torch.full_like(count, len(best))
    place[best] = torch.arange(len(best), device=place.device)
    return names, place


def _repeats(set_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Tokens since the same set was chosen last in the sequence, int64 (T,); 0 where never."""
    runs = torch.unique_consecutive(sequence_T, return_inverse=True)[1]
    key_T = runs * (int(set_T.max()) + 1) + set_T
    order = torch.sort(key_T, stable=True).indices
    gap_T = torch.zeros_like(set_T)
    again = key_T[order][1:] == key_T[order][:-1]
    gap_T[order[1:]] = torch.where(again, order[1:] - order[:-1], 0)
    return gap_T


def _mean(value: Tensor, sequence_T: Tensor, distance: int) -> float | None:
    """Mean over tokens whose partner `distance` places before is of the same sequence."""
    same = sequence_T[distance:] == sequence_T[:-distance]
    return float(value[same].double().mean()) if bool(same.any()) else None


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
