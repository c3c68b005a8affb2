"""Targets of the pre-gating router: what each layer has to say, and that it is said."""

from __future__ import annotations

import math

import torch

from fissile.refactor.router import choice_costs, oracle_targets, threshold_targets

L, T, E = 3, 50, 6


def norms() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 4.0, 0.5])[:, None, None]
    return scale * torch.rand(L, T, E, generator=rng)


def test_layers_of_any_scale_have_the_same_say() -> None:
    plain, rescaled = (oracle_targets(n, False) for n in (norms(), norms() * torch.rand(L, 1, 1)))
    torch.testing.assert_close(plain, rescaled)
    per_layer = oracle_targets(norms(), True)
    assert per_layer.shape == (L, T, E)
    torch.testing.assert_close(per_layer.mean(0, keepdim=True), plain)
    torch.testing.assert_close(per_layer.square().mean((1, 2)), torch.ones(L))
    torch.testing.assert_close(plain.sum(-1), torch.zeros(1, T), atol=1e-5, rtol=0)


def test_a_choice_costs_its_spread_times_the_price_of_an_error() -> None:
    prices = torch.tensor([2.0, 0.5, 0.0])
    cost = choice_costs(norms(), prices)
    spread = (norms() - norms().mean(-1, keepdim=True)).square().mean((1, 2))
    torch.testing.assert_close(cost / cost.sum(), spread * prices / (spread * prices).sum())
    torch.testing.assert_close(cost.mean(), torch.tensor(1.0))


def test_a_layer_that_costs_nothing_has_no_say() -> None:
    common = oracle_targets(norms(), False, torch.tensor([1.0, 0.0, 0.0]))
    first = oracle_targets(norms()[:1], True)
    cosine = torch.nn.functional.cosine_similarity(common.flatten(), first.flatten(), dim=0)
    assert cosine > 1 - 1e-5
    # The temperature means the same whatever the weights.
    plain = oracle_targets(norms(), False)
    torch.testing.assert_close(common.square().mean(), plain.square().mean())


def test_a_threshold_means_the_same_for_all_tokens() -> None:
    """By hand: the costliest (token, expert) pairs of all tokens, none beyond a token's cap."""
    prices = torch.tensor([1.0, 4.0, 0.25])
    value = sum(math.sqrt(p) * n for p, n in zip(prices.tolist(), norms().double(), strict=True))
    (found,) = threshold_targets(norms(), False, 2, E, prices)
    count = 2 * T
    best = value.flatten().topk(count).indices
    assert torch.equal(found.flatten().nonzero().flatten(), best.sort().values)
    assert len(found.sum(-1).unique()) > 2
    (capped,) = threshold_targets(norms(), False, 2, 3, prices)
    assert capped.sum(-1).max() == 3
    assert capped.sum() == count
    # Within a token a cap leaves the best.
    kept = capped.sum(-1).long()
    for t in range(T):
        assert set(capped[t].nonzero().flatten().tolist()) == set(
            value[t].topk(int(kept[t])).indices.tolist()
        )


def test_heads_have_a_threshold_each() -> None:
    found = threshold_targets(norms(), True, 2, E)
    assert found.shape == (L, T, E)
    assert (found.sum((1, 2)) == 2 * T).all()
    for own, n in zip(found.bool(), norms(), strict=True):
        assert n[own].min() >= n[~own].max()
