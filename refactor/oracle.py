"""The oracle router, and how near another router comes to it.

The oracle picks the experts whose output sum_{i in e} h_i w_i is largest for a token: an upper
bound, since it looks at what it decides about.
Shapes: T tokens, D model width, F FFN width, E experts,
K chosen per token, N domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_ROWS = 256
"""Tokens at a time: few enough that their activations stay in the processor's cache."""


class HasExperts(Protocol):
    """Any partition: disjoint or overlapping."""

    def expert_indices(self) -> list[Tensor]:
        """Original neuron indices of each expert, int64."""
        ...


class ExpertNorms:
    """Output norms of the experts of one layer; the factors are computed once.

    An expert of no more neurons than the model is wide is first reduced by QR: ||W h|| = ||R h||
    with an upper triangular M x M factor. Unlike a Gram matrix, that keeps the precision of small
    norms.

    Args:
        down_DF: weight of the down projection (D, F).
        partition: which neurons make an expert.
        mean_F: where given, norms are of h - mean_F: what is left once the means are compensated.
    """

    def __init__(
        self, down_DF: Tensor, partition: HasExperts, mean_F: Tensor | None = None
    ) -> None:
        dtype = torch.promote_types(down_DF.dtype, torch.float32)
        self.mean_F = None if mean_F is None else mean_F.to(dtype)
        self.index = partition.expert_indices()
        self.factors = []
        for index_M in self.index:
            down_DM = down_DF[:, index_M].to(dtype)
            small = down_DM.shape[1] <= down_DM.shape[0]
            self.factors.append(torch.linalg.qr(down_DM, mode="r").R if small else down_DM)

    def __call__(self, h_TF: Tensor) -> Tensor:
        """Norms of every expert's output.

        Args:
            h_TF: neuron activations (T, F).

        Returns:
            (T, E), at least float32.
        """
        dtype = self.factors[0].dtype
        norms_TE = h_TF.new_empty(len(h_TF), len(self.index), dtype=dtype)
        for begin in range(0, len(h_TF), _ROWS):
            rows = slice(begin, begin + _ROWS)
            h_RF = h_TF[rows].to(dtype)
            for e, (index_M, factor) in enumerate(zip(self.index, self.factors, strict=True)):
                h_RM = h_RF.index_select(1, index_M)
                if self.mean_F is not None:
                    h_RM -= self.mean_F[index_M]
                norms_TE[rows, e] = _norms(h_RM, factor)
        return norms_TE


def _norms(h_RM: Tensor, factor: Tensor) -> Tensor:
    """||factor h|| of every row, (R,); a square factor is upper triangular."""
    width = h_RM.shape[1]
    if len(factor) != width:
        return torch.linalg.vector_norm(h_RM @ factor.T, dim=1)
    parts = []
    step = max(64, -(-width // 4))  # four blocks of rows skip most of the zeros
    for begin in range(0, width, step):
        block = factor[begin : begin + step, begin:]
        parts.append(torch.linalg.vector_norm(h_RM[:, begin:] @ block.T, dim=1))
    return torch.linalg.vector_norm(torch.stack(parts), dim=0)


def expert_norms(
    h_TF: Tensor, down_DF: Tensor, partition: HasExperts, mean_F: Tensor | None = None
) -> Tensor:
    """||sum_{i in e} h_i w_i|| of every token and expert, (T, E); see `ExpertNorms`."""
    return ExpertNorms(down_DF, partition, mean_F)(h_TF)


def top_experts(scores_TE: Tensor, k: int) -> Tensor:
    """The K experts of highest score, ties to the lower index.

    Returns:
        int64 (T, K), best first.
    """
    if not 1 <= k <= scores_TE.shape[1]:
        raise ValueError(f"k {k} is not in 1..{scores_TE.shape[1]}")
    return torch.sort(scores_TE, dim=1, descending=True, stable=True).indices[:, :k]


def chosen_mask(index_TK: Tensor, num_experts: int) -> Tensor:
    """bool (T, E): whether an expert is among a token's choices; -1 is none."""
    mask = torch.zeros(len(index_TK), num_experts + 1, dtype=torch.bool, device=index_TK.device)
    return mask.scatter_(1, torch.where(index_TK < 0, num_experts, index_TK), True)[:, :-1]


@dataclass(frozen=True, eq=False)
class RoutingReport:
    """One router against the oracle on the same experts and tokens.

    Args:
        recall: share of the oracle's K experts that were chosen.
        exact: share of tokens with exactly the oracle's set.
        mass: sum of the chosen experts' norms over that of the oracle's choices.
        load_E: share of all choices that fell on each expert, sums to 1.
        entropy: of the load, nats; log E when all experts are chosen alike.
        imbalance: largest load over mean load.
        switch_rate: share of neighbouring tokens of a sequence whose sets differ; NaN without any.
        domain_NE: share of a domain's tokens that chose the expert; NaN rows for absent domains.
    """

    recall: float
    exact: float
    mass: float
    load_E: Tensor
    entropy: float
    imbalance: float
    switch_rate: float
    domain_NE: Tensor


def routing_report(
    index_TK: Tensor, norms_TE: Tensor, *, domain_T: Tensor, domains: int, sequence_T: Tensor
) -> RoutingReport:
    """Compare choices with the oracle's.

    Args:
        index_TK: int64 (T, K), a router's choices, distinct within a token.
        norms_TE: the experts' output norms (T, E).
        domain_T: int64 (T,), domain label of each token.
        domains: N.
        sequence_T: int64 (T,), which sequence a token belongs to; tokens are in reading order.

    Raises:
        ValueError: no tokens, or shapes that do not fit.
    """
    tokens, experts = norms_TE.shape
    if tokens == 0 or len(index_TK) != tokens or {len(domain_T), len(sequence_T)} != {tokens}:
        raise ValueError(f"need choices, domain and sequence of each of {tokens} > 0 tokens")
    chosen_TE = chosen_mask(index_TK, experts)
    best_TE = chosen_mask(top_experts(norms_TE, index_TK.shape[1]), experts)
    norms = norms_TE.double()
    best_mass = (norms * best_TE).sum()
    mass = (norms * chosen_TE).sum() / best_mass if best_mass > 0 else norms.new_ones(())
    load_E = chosen_TE.double().sum(0) / chosen_TE.sum()
    entropy = torch.special.entr(load_E).sum()
    member_NT = torch.nn.functional.one_hot(domain_T, domains).T.double()
    return RoutingReport(
        recall=float((chosen_TE & best_TE).sum() / best_TE.sum()),
        exact=float((chosen_TE == best_TE).all(1).double().mean()),
        mass=float(mass),
        load_E=load_E,
        entropy=float(entropy),
        imbalance=float(load_E.max() * experts),
        switch_rate=switch_rate(chosen_TE, sequence_T),
        domain_NE=(member_NT @ chosen_TE.double()) / member_NT.sum(1, keepdim=True),
    )


def router_quality(
    choices: Sequence[Tensor], norms_LTE: Tensor, sequence_T: Tensor
) -> dict[str, list[float]]:
    """`routing_report` of every layer in lists, as JSON.

    Args:
        choices: int64 (T, K) per layer, or a single entry for one decision that serves all.
        norms_LTE: the experts' output norms, L layers.
        sequence_T: int64 (T,), which sequence a token belongs to.

    Returns:
        "recall_at_k", "exact", "mass", "switch_rate", "entropy" (over its maximum) and
        "imbalance" (largest load over the mean), each with L values.

    Raises:
        ValueError: neither one entry nor one a layer, or shapes that do not fit.
    """
    layers, _, experts = norms_LTE.shape
    if len(choices) not in (1, layers):
        raise ValueError(f"{len(choices)} decisions for {layers} layers")
    domain_T = torch.zeros_like(sequence_T)
    found = [
        routing_report(
            choices[i % len(choices)], norms, domain_T=domain_T, domains=1, sequence_T=sequence_T
        )
        for i, norms in enumerate(norms_LTE)
    ]
    return {
        "recall_at_k": [r.recall for r in found],
        "exact": [r.exact for r in found],
        "mass": [r.mass for r in found],
        "switch_rate": [r.switch_rate for r in found],
        "entropy": [r.entropy / math.log(max(2, experts)) for r in found],
        "imbalance": [r.imbalance for r in found],
    }


def switch_rate(chosen_TE: Tensor, sequence_T: Tensor) -> float:
    """Share of neighbouring tokens of one sequence whose chosen sets differ; NaN without any."""
    same = sequence_T[1:] == sequence_T[:-1]
    differ = (chosen_TE[1:] != chosen_TE[:-1]).any(1)
    return float(differ[same].double().mean())
