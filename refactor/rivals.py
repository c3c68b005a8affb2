"""Published ways to make experts and choose among them, on this package's own code path.

What each does is taken from its paper; where its released code differs, the code is followed and
the difference is said. All return a partition and the tensors of a layer-wise router, so that they
are measured with the same runtime, the same tokens and the same active share.
Shapes: T tokens, D model width, F FFN width, E routed experts, M neurons per expert, N samples,
K chosen per token, A markers per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fissile.refactor.layerwise import mean_gate_selector, representative_selector
from fissile.refactor.partition import (
    Partition,
    balanced_assign,
    build_partition,
    choose_shared,
    cluster,
    partition_neurons,
)

PIN = 8192.0
"""Balance of an expert that is always chosen: beyond any score, exact in bfloat16."""
_ROWS = 2048
"""Tokens per product."""


@dataclass(frozen=True, eq=False)
class Rival:
    """One layer as a rival builds it.

    Attributes:
        partition: shared neurons and balanced experts.
        selector: tensors of the router, named as in the artifact ("selector.weight" ...).
        kind: value of `routing["selector"]`.
        report: what the method decided, JSON.
    """

    partition: Partition
    selector: dict[str, Tensor]
    kind: str
    report: dict[str, float]


class MarkerStatistics:
    """CMoE's activation markers (section 4.1): which neurons fire hardest for each token.

    The paper marks the largest |h|. The released code computes h from L2-normalised inputs and
    weights, silu(cos(x, g_i)) cos(x, u_i), always with 10 markers per token and without regard to
    the size of the neuron's output, and only its first batch of 8 x 2048 tokens is used; so here.

    Args:
        gate_FD: weight of the gate projection.
        up_FD: weight of the up projection.
        activation: of the gate.
        top: A, markers per token.
        tokens: later tokens are ignored.
    """

    def __init__(
        self,
        gate_FD: Tensor,
        up_FD: Tensor,
        activation: Callable[[Tensor], Tensor],
        *,
        top: int = 10,
        tokens: int = 16384,
    ) -> None:
        if not 1 <= top <= len(gate_FD):
            raise ValueError(f"top {top} is not in 1..{len(gate_FD)}")
        self._gate_FD, self._up_FD = (normalize(w.float(), dim=1) for w in (gate_FD, up_FD))
        self._activation, self._top, self._limit = activation, top, tokens
        self._rows: list[Tensor] = []
        self.count = 0

    def add(self, x_TD: Tensor) -> None:
        """Add tokens: the FFN's inputs."""
        for part in x_TD[: self._limit - self.count].split(_ROWS):
            x = normalize(part.float(), dim=1)
            h = self._activation(x @ self._gate_FD.T) * (x @ self._up_FD.T)
            self._rows.append(h.abs().topk(self._top, dim=1).indices)
            self.count += len(x)

    def index_TA(self) -> Tensor:
        """The marked neurons of every token, int64.

        Raises:
            ValueError: no tokens were added.
        """
        if not self.count:
            raise ValueError("no calibration tokens were added")
        return torch.cat(self._rows)


def cmoe_layer(
    markers: MarkerStatistics,
    gate_FD: Tensor,
    up_FD: Tensor,
    *,
    shared_size: int,
    num_experts: int,
) -> Rival:
    """CMoE (arXiv 2502.04416, section 4): shared by rate, one assignment, one neuron as router.

    The paper speaks of balanced k-means; the released code makes a single assignment to the E
    routed neurons of highest rate (`max_iters=1`), by L1 distance of binary markers. The router of
    an expert is the neuron nearest the mean of its markers, rows scaled to unit norm.
    S3A3E8 is `shared_size` 3F/8, `num_experts` 5 and three chosen.

    Args:
        markers: of the layer.
        gate_FD: weight of the gate projection.
        up_FD: weight of the up projection.
        shared_size: S; F - S is a multiple of E.
        num_experts: E.
    """
    index_TA, width = markers.index_TA(), len(gate_FD)
    rate_F = torch.bincount(index_TA.flatten(), minlength=width).double()
    shared = choose_shared(rate_F, shared_size)
    routed_F = torch.ones(width, dtype=torch.bool, device=gate_FD.device)
    routed_F[shared] = False
    routed = torch.nonzero(routed_F).flatten()
    seeds = routed[torch.sort(rate_F[routed], descending=True, stable=True).indices[:num_experts]]
    seed_F = torch.full((width,), -1, device=gate_FD.device)
    seed_F[seeds] = torch.arange(num_experts, device=gate_FD.device)
    # Binary rows: ||a - b||_1 = |a| + |b| - 2 a b, and a token adds to A products at most.
    both_FE = rate_F.new_zeros(width, num_experts)
    token, place = torch.where(seed_F[index_TA] >= 0)
    neurons_NA, expert_N = index_TA[token], seed_F[index_TA[token, place]]
    flat = (neurons_NA * num_experts + expert_N[:, None]).flatten()
    both_FE += torch.bincount(flat, minlength=width * num_experts).view_as(both_FE)
    cost_NE = (rate_F[:, None] + rate_F[seeds] - 2 * both_FE)[routed]
    labels = torch.full((width,), -1, dtype=torch.int64, device=gate_FD.device)
    labels[routed] = balanced_assign(cost_NE, len(routed) // num_experts)
    partition = build_partition(shared, labels, num_experts)
    distance_F = _marker_distance(index_TA, partition)
    selector = representative_selector(gate_FD, up_FD, partition, distance_F, normalise=True)
    shared_rate = float(rate_F[shared].sum() / rate_F.sum())
    return Rival(partition, selector, "glu", {"markers_on_shared": shared_rate})


def _marker_distance(index_TA: Tensor, partition: Partition) -> Tensor:
    """Squared distance (F,) of each neuron's markers to its expert's mean, up to a constant each.

    L1 and squared L2 rank binary rows alike: both are const + sum_t a_t (1 - 2 m_t).
    """
    labels_F, experts = partition.labels_F(), partition.num_experts
    expert_TA = labels_F[index_TA]
    mean_TE = torch.zeros(len(index_TA), experts + 1, dtype=torch.float64, device=index_TA.device)
    mean_TE.scatter_add_(1, expert_TA % (experts + 1), torch.ones_like(index_TA).double())
    mean_TA = mean_TE.gather(1, expert_TA % (experts + 1)) / partition.expert_size
    distance_F = mean_TE.new_zeros(len(labels_F))
    return distance_F.index_add(0, index_TA.flatten(), (1 - 2 * mean_TA).flatten())


class ProfileStatistics:
    """ExpertWeaver's activation profiles (section 3.2): act(g_i x), mean over a sample's tokens.

    No code was released. Samples are calibration windows here; the paper takes one mean per task
    sample of 42 to 48 Flan tasks.

    Args:
        gate_FD: weight of the gate projection.
        activation: of the gate.
        samples: N.
    """

    def __init__(
        self, gate_FD: Tensor, activation: Callable[[Tensor], Tensor], samples: int
    ) -> None:
        self._gate_FD, self._activation = gate_FD.float(), activation
        self._sum_NF = torch.zeros(samples, len(gate_FD), dtype=torch.float64)
        self._abs_F = torch.zeros(len(gate_FD), dtype=torch.float64)
        self._tokens_N = torch.zeros(samples, dtype=torch.float64)

    def add(self, x_TD: Tensor, sample_T: Tensor) -> None:
        """Add tokens.

        Args:
            x_TD: the FFN's inputs.
            sample_T: int64 (T,), sample of each token, 0..N-1.
        """
        for x, sample in zip(x_TD.split(_ROWS), sample_T.split(_ROWS), strict=True):
            opened = self._activation(x.float() @ self._gate_FD.T).double()
            self._sum_NF.index_add_(0, sample, opened)
            self._abs_F += opened.abs().sum(0)
            self._tokens_N.index_add_(0, sample, torch.ones(len(x), dtype=torch.float64))

    def profiles_FN(self) -> Tensor:
        """Signed mean of act(g_i x) per neuron and sample that has tokens, float64.

        Raises:
            ValueError: no tokens were added.
        """
        seen = self._tokens_N > 0
        if not bool(seen.any()):
            raise ValueError("no calibration tokens were added")
        return (self._sum_NF[seen] / self._tokens_N[seen, None]).T

    def mean_abs_F(self) -> Tensor:
        """E|act(g_i x)| over all tokens, float64."""
        return self._abs_F / self._tokens_N.sum().clamp_min(1)


def adaptive_share(
    profiles_FN: Tensor, *, low: float = 0.2, high: float = 0.7, cut: float = 0.6
) -> float:
    """ExpertWeaver's share of shared neurons of a layer (section 3.3).

    alpha = high - (high - low) * share of neurons whose CV = std / |mean| over samples exceeds
    `cut`. Profiles are signed: with magnitudes the variation collapses and all layers get `high`.
    """
    mean_F = profiles_FN.mean(1).abs()
    variation_F = profiles_FN.std(1, correction=0) / (mean_F + 1e-8)
    return high - (high - low) * float((variation_F > cut).double().mean())


def expertweaver_layer(
    profiles: ProfileStatistics,
    gate_FD: Tensor,
    *,
    num_experts: int,
    active: int,
    seed: int,
    shared: int | None = None,
) -> Rival:
    """ExpertWeaver (arXiv 2602.15521): experts of like profile, mean gate rows as linear router.

    The number of shared experts differs between layers. All experts are declared routed and
    `active` are chosen everywhere; a balance of `PIN` makes the shared ones first choice, so the
    active share is active / num_experts in every layer (routing needs `selection_bias`).

    Args:
        profiles: of the layer.
        gate_FD: weight of the gate projection; F is a multiple of `num_experts`.
        num_experts: all experts of the layer, 64 in the paper; shared ones come first.
        active: experts computed per token, shared ones included: `top_k`.
        seed: of the clustering.
        shared: number of shared experts; default the layer-adaptive rule, at most `active`.

    Raises:
        ValueError: F is no multiple, or `active` or `shared` is out of range.
    """
    profiles_FN, width = profiles.profiles_FN(), len(gate_FD)
    size, left = divmod(width, num_experts)
    alpha = adaptive_share(profiles_FN)
    pinned = min(active, round(alpha * num_experts)) if shared is None else shared
    if left or not 1 <= active < num_experts or not 0 <= pinned <= active:
        raise ValueError(
            f"{width} neurons, {num_experts} experts, {active} active, {pinned} pinned"
        )
    inner = partition_neurons(
        profiles.mean_abs_F(),
        profiles_FN,
        shared_size=pinned * size,
        num_experts=num_experts - pinned,
        seed=seed,
    )
    partition = Partition(inner.order_F, 0, size, num_experts)
    selector = mean_gate_selector(gate_FD, partition)
    balance_E = torch.zeros(num_experts)
    balance_E[:pinned] = PIN
    selector["selector.balance"] = balance_E
    return Rival(partition, selector, "linear", {"alpha": alpha, "shared": float(pinned)})


def emoe_layer(keys_FD: Tensor, *, num_experts: int, seed: int) -> Rival:
    """EMoE (arXiv 2310.10908) and MoEfication's split (2110.01786): clustered keys, avg-k router.

    Balanced k-means on the rows of one projection, scaled to unit norm as in MoEfication's code;
    an expert's score is the mean of its keys times x. No shared neurons: the active share is K / E.

    Args:
        keys_FD: up projection, the keys of a gated FFN in EMoE; F is a multiple of `num_experts`.
        num_experts: E.
        seed: of the clustering.

    Raises:
        ValueError: F is no multiple of `num_experts`.
    """
    width = len(keys_FD)
    labels = cluster(
        keys_FD.float(), num_experts, width // num_experts, seed=seed, standardize=True
    )
    none = torch.empty(0, dtype=torch.int64, device=keys_FD.device)
    partition = build_partition(none, labels, num_experts)
    return Rival(partition, mean_gate_selector(keys_FD, partition), "linear", {})
