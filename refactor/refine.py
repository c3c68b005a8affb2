"""Moving neurons to the experts that a router will actually choose when they matter.

Clustering by likeness does not know the router. Here choices and experts take turns, as in k-means.
Given the experts, a router that can be had (predicted from inputs, not the oracle) chooses for
every token of a sample. Given the choices, a transportation problem moves each neuron to where most
of its output energy is computed; shared neurons are a cluster that every token chooses, so that
their selection is part of the same problem. Choices that all layers have in common give experts
that one decision can serve, numbered alike.
Shapes: T sampled tokens, D model width, F FFN width, S shared neurons, E routed experts, M neurons
per expert, K experts chosen per token, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fissile.refactor.align import align_experts
from fissile.refactor.layerwise import ranking_targets
from fissile.refactor.moments import Moments
from fissile.refactor.oracle import chosen_mask, expert_norms, top_experts
from fissile.refactor.partition import Partition, balanced_assign, build_partition
from fissile.refactor.statistics import column_norms, token_signs

_ROWS = 2048
"""Tokens per float64 copy of the activations."""


class ChoiceEnergy:
    """Output energy h^2 ||w||^2 of every neuron, summed over the tokens that chose each expert.

    Args:
        down_norm_F: (F,) norms of the neurons' output vectors.
        num_experts: E.
        mean_F: where given, energy is of h - mean_F: what a constant cannot make up for.

    Attributes:
        chosen_FE: energy over the tokens that chose expert e, float64 (F, E).
        total_F: energy over all tokens, float64 (F,).
    """

    def __init__(self, down_norm_F: Tensor, num_experts: int, mean_F: Tensor | None = None) -> None:
        self.weight_F = down_norm_F.double().square()
        self.mean_F = torch.zeros_like(self.weight_F) if mean_F is None else mean_F.double()
        self.total_F = torch.zeros_like(self.weight_F)
        self.chosen_FE = self.weight_F.new_zeros(len(down_norm_F), num_experts)

    def add(self, h_TF: Tensor, index_TK: Tensor) -> None:
        """Add T tokens with activations (T, F) and the experts they chose, int64 (T, K)."""
        for h, index in zip(h_TF.split(_ROWS), index_TK.split(_ROWS), strict=True):
            energy_TF = (h.double() - self.mean_F).square()
            mask_TE = chosen_mask(index, self.chosen_FE.shape[1]).double()
            self.total_F += energy_TF.sum(0) * self.weight_F
            self.chosen_FE += (energy_TF.T @ mask_TE) * self.weight_F[:, None]

    def captured(self, partition: Partition) -> float:
        """Share of all energy that is computed when neurons sit in these experts, 0..1."""
        labels_F = partition.labels_F()
        routed_F = self.chosen_FE.gather(1, labels_F.clamp_min(0)[:, None])[:, 0]
        kept_F = torch.where(labels_F < 0, self.total_F, routed_F)
        total = self.total_F.sum()
        return float(kept_F.sum() / total) if total > 0 else 1.0

    def reassign(self, shared_size: int, expert_size: int) -> Partition:
        """The partition that captures most of the energy under these choices.

        Experts keep their numbers: expert e is what tokens get that chose e.
        """
        experts = self.chosen_FE.shape[1]
        gain = torch.cat([self.chosen_FE, self.total_F[:, None]], dim=1)
        sizes = torch.tensor([expert_size] * experts + [shared_size])
        scale = gain.abs().mean().clamp_min(torch.finfo(torch.float64).tiny)
        labels_F = balanced_assign(-gain / scale, sizes)
        shared = torch.nonzero(labels_F == experts).flatten()
        return build_partition(shared, labels_F, experts)


@dataclass(frozen=True, eq=False)
class LayerSample:
    """One layer on the sampled tokens.

    Args:
        h_TF: neuron activations (T, F).
        x_TD: inputs of the FFN (T, D).
        down_DF: weight of the down projection (D, F).
    """

    h_TF: Tensor
    x_TD: Tensor
    down_DF: Tensor


@dataclass(frozen=True, eq=False)
class Refined:
    """Partitions of all layers and how they came about.

    Args:
        partitions: one per layer; where the choice is common, expert e means the same in each.
        captured: share of output energy that the router's choices compute, mean over layers, before
            and after every round; the partitions are those of the largest.
    """

    partitions: list[Partition]
    captured: list[float]


def refine_partitions(
    partitions: Sequence[Partition],
    sample: Callable[[int], LayerSample],
    sequence_T: Tensor,
    *,
    top_k: int,
    common: bool,
    predict_from: Callable[[int], Tensor] | None,
    rounds: int,
    ridge: float,
    means: Sequence[Tensor] | None = None,
) -> Refined:
    """Alternate between choosing experts for tokens and experts for neurons.

    Args:
        partitions: a start for every layer, e.g. from clustering.
        sample: index of a layer to its activations on the sampled tokens; called once per layer and
            round, and once more before and after.
        sequence_T: int64 (T,), which sequence a token belongs to.
        top_k: K.
        common: one choice for all layers, from the layers' mean standardised norms.
        predict_from: index of a layer to the inputs (T, D) that a linear router would see; with a
            common choice only layer 0 is asked. None: the oracle chooses.
        rounds: most rounds; it stops earlier when nothing is gained. The best round is returned.
        ridge: of the predicted choices, in units of the mean variance of the inputs.
        means: E[h] of every layer (F,), where constants are compensated.

    Raises:
        ValueError: no partitions.
    """
    if not partitions:
        raise ValueError("no partitions to refine")
    choose = _Chooser(sequence_T, top_k, common, predict_from, ridge)
    current = list(partitions)
    norms = [_norms(sample(i), p, means, i) for i, p in enumerate(current)]
    if common:
        orders = align_experts(norms)
        current = [p.permute_experts(o) for p, o in zip(current, orders, strict=True)]
        norms = [n[:, o] for n, o in zip(norms, orders, strict=True)]
    best, captured = current, list[float]()
    for _ in range(rounds + 1):
        choices, shares, moved = choose(norms), [], []
        for i, partition in enumerate(current):
            layer = sample(i)
            energy = ChoiceEnergy(
                column_norms(layer.down_DF),
                partition.num_experts,
                None if means is None else means[i],
            )
            energy.add(layer.h_TF, choices[i])
            shares.append(energy.captured(partition))
            moved.append(energy.reassign(partition.shared_size, partition.expert_size))
            norms[i] = _norms(layer, moved[i], means, i)
        captured.append(sum(shares) / len(shares))
        if captured[-1] <= max(captured[:-1], default=0.0) + 1e-5:
            break
        best, current = current, moved
    return Refined(best, captured)


def _norms(
    layer: LayerSample, partition: Partition, means: Sequence[Tensor] | None, i: int
) -> Tensor:
    mean_F = None if means is None else means[i]
    return expert_norms(layer.h_TF, layer.down_DF, partition, mean_F)


@dataclass(frozen=True, eq=False)
class _Chooser:
    """Norms of every layer (T, E) to the experts that each token gets in each layer (T, K)."""

    sequence_T: Tensor
    top_k: int
    common: bool
    predict_from: Callable[[int], Tensor] | None
    ridge: float

    def __call__(self, norms: Sequence[Tensor]) -> list[Tensor]:
        targets = [ranking_targets(n) for n in norms]
        if self.common:
            spread = [t.square().mean().sqrt().clamp_min(1e-12) for t in targets]
            targets = [torch.stack([t / s for t, s in zip(targets, spread, strict=True)]).mean(0)]
        if self.predict_from is not None:
            targets = [
                cross_predict(self.predict_from(i), target, self.sequence_T, self.ridge)
                for i, target in enumerate(targets)
            ]
        chosen = [top_experts(target, self.top_k) for target in targets]
        return chosen * len(norms) if self.common else chosen


def cross_predict(x_TD: Tensor, y_TE: Tensor, sequence_T: Tensor, ridge: float) -> Tensor:
    """Linear predictions of y, each made by a fit that has not seen the token's sequence.

    Args:
        x_TD: inputs (T, D).
        y_TE: targets (T, E).
        sequence_T: int64 (T,); whole sequences fall into one of two folds.
        ridge: in units of the mean variance of x.

    Returns:
        (T, E) float32.
    """
    fold_T = token_signs(sequence_T, 1, seed=0)[:, 0] > 0
    if bool(fold_T.all()) or not bool(fold_T.any()):
        fold_T = torch.arange(len(x_TD), device=x_TD.device) % 2 > 0  # a single sequence
    found_TE = torch.empty_like(y_TE, dtype=torch.float32)
    for fit_T in (fold_T, ~fold_T):
        moments = Moments(x_TD.shape[1], y_TE.shape[1], x_TD.device)
        moments.add(x_TD[fit_T], y_TE[fit_T])
        weight_ED, bias_E = (tensor.float() for tensor in moments.solve(ridge))
        found_TE[~fit_T] = x_TD[~fit_T].float() @ weight_ED.T + bias_E
    return found_TE
