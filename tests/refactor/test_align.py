"""Alignment of experts across layers: planted permutations and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fissile.refactor.align import agreement, align_experts


def layers(count: int, experts: int, noise: float) -> tuple[list[Tensor], list[Tensor]]:
    """Noisy copies of one profile, each with its experts shuffled, scaled and shifted."""
    rng = torch.Generator().manual_seed(0)
    base = torch.rand(600, experts, generator=rng)
    norms, shuffles = [], []
    for layer in range(count):
        shuffles.append(torch.randperm(experts, generator=rng))
        noisy = base + noise * torch.rand(base.shape, generator=rng)
        norms.append(noisy[:, shuffles[-1]] * (layer + 1) + torch.rand(600, 1, generator=rng))
    return norms, shuffles


def test_planted_permutations_are_found() -> None:
    norms, shuffles = layers(5, 12, noise=0.5)
    orders = align_experts(norms)
    aligned = [shuffle[order].tolist() for shuffle, order in zip(shuffles, orders, strict=True)]
    assert all(a == aligned[0] for a in aligned)
    assert sorted(aligned[0]) == list(range(12))


def test_two_layers_are_matched_optimally() -> None:
    rng = torch.Generator().manual_seed(1)
    norms = [torch.rand(60, 5, generator=rng) for _ in range(2)]
    orders = align_experts(norms)
    identity = torch.arange(5)
    best = max(
        agreement(norms, [identity, torch.tensor(p)]) for p in itertools.permutations(range(5))
    )
    assert agreement(norms, orders) == pytest.approx(best, abs=1e-12)
    assert best > agreement(norms, [identity, identity])


def test_agreement_is_a_correlation() -> None:
    norms, shuffles = layers(3, 6, noise=0.0)
    truth = [s.argsort() for s in shuffles]
    assert agreement(norms, truth) == pytest.approx(1.0, abs=1e-3)
    assert agreement(norms[:1], truth[:1]) == 0.0
    rng = torch.Generator().manual_seed(2)
    strangers = [torch.rand(4000, 6, generator=rng) for _ in range(3)]
    assert abs(agreement(strangers, [torch.arange(6)] * 3)) < 0.03


def test_later_layers_correct_the_first_matches() -> None:
    norms, _ = layers(12, 10, noise=8.0)
    once, settled = align_experts(norms, rounds=0), align_experts(norms)
    assert agreement(norms, settled) > agreement(norms, once)


def test_one_layer_stays_as_it_is() -> None:
    assert align_experts([torch.rand(10, 4)])[0].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="cannot be aligned"):
        align_experts([torch.rand(10, 4), torch.rand(10, 5)])
