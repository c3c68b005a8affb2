"""Rival constructions against their definitions written out densely."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

from fissile.models.routers_fissile import choose, selector_scores
from fissile.refactor.rivals import (
    PIN,
    MarkerStatistics,
    ProfileStatistics,
    adaptive_share,
    cmoe_layer,
    emoe_layer,
    expertweaver_layer,
)

D, F, T, TOP = 12, 60, 900, 6
silu = torch.nn.functional.silu


def weights() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    topics = torch.randn(6, D, generator=rng) * 3  # neurons of a topic fire together
    often = (6 * torch.rand(T, generator=rng) ** 2).long()
    x = topics[often] + torch.randn(T, D, generator=rng)
    gate, up = torch.randn(2, F, D, generator=rng)
    return x, gate * torch.rand(F, 1, generator=rng), up


def test_cmoe_is_its_description() -> None:
    x, gate, up = weights()
    markers = MarkerStatistics(gate, up, silu, top=TOP, tokens=700)
    for part in x.split(400):
        markers.add(part)
    found = cmoe_layer(markers, gate, up, shared_size=12, num_experts=4)

    unit = [w.double() / w.double().norm(dim=1, keepdim=True) for w in (x[:700], gate, up)]
    h = silu(unit[0] @ unit[1].T) * (unit[0] @ unit[2].T)
    binary = torch.zeros(F, 700)
    for t in range(700):
        binary[h[t].abs().topk(TOP).indices, t] = 1
    rate = binary.sum(1)
    shared = rate.argsort(descending=True, stable=True)[:12].sort().values
    assert torch.equal(found.partition.shared, shared)
    assert found.report["markers_on_shared"] == pytest.approx(float(rate[shared].sum()) / 4200)

    routed = torch.tensor([i for i in range(F) if i not in set(shared.tolist())])
    seeds = routed[rate[routed].argsort(descending=True, stable=True)[:4]]
    cost = (binary[routed][:, None] - binary[seeds][None]).abs().sum(2).numpy()
    best = scipy.optimize.linear_sum_assignment(np.repeat(cost, 12, axis=1))
    labels = found.partition.labels_F()[routed].numpy()
    assert np.bincount(labels).tolist() == [12] * 4
    got = cost[np.arange(len(routed)), labels].sum()
    assert got == pytest.approx(np.repeat(cost, 12, axis=1)[best].sum())

    for e, index in enumerate(found.partition.expert_indices()):
        middle = binary[index].mean(0)
        for order in (1, 2):  # both norms agree on the representative
            distance = (binary[index] - middle).norm(p=order, dim=1)
            nearest = index[distance <= distance.min() + 1e-4]
            rows = [unit[1][i].float() for i in nearest.tolist()]
            assert any(torch.allclose(found.selector["selector.gate"][e], r) for r in rows)
    assert found.selector["selector.up"].norm(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_markers_ignore_scale_and_late_tokens() -> None:
    x, gate, up = weights()
    one, two = (MarkerStatistics(gate, up, silu, top=TOP, tokens=500) for _ in range(2))
    one.add(x)
    for part in (x * 7).split(300):
        two.add(part)
    assert one.count == two.count == 500
    assert torch.equal(one.index_TA(), two.index_TA())
    with pytest.raises(ValueError, match="no calibration tokens"):
        MarkerStatistics(gate, up, silu, top=TOP).index_TA()
    with pytest.raises(ValueError, match=r"top 61 is not in 1\.\.60"):
        MarkerStatistics(gate, up, silu, top=61)


def test_profiles_are_means_over_samples() -> None:
    x, gate, _ = weights()
    sample = torch.arange(T) // 100
    stats = ProfileStatistics(gate, silu, 12)  # three samples stay empty
    for part in torch.arange(T).split(250):
        stats.add(x[part], sample[part])
    opened = silu(x.double() @ gate.double().T)
    want = torch.stack([opened[sample == n].mean(0) for n in range(9)], 1)
    torch.testing.assert_close(stats.profiles_FN(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.mean_abs_F(), opened.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_adaptive_share_by_hand() -> None:
    rows = [[1.0] * 10, [1.0, 3.0] * 5, [-1.0, -9.0] * 5, [1.0] * 9 + [-0.9]]
    profiles = torch.tensor(rows, dtype=torch.float64)
    # Coefficients of variation 0, 0.5, 0.8 and 0.57 / 0.81: half of the neurons vary.
    assert adaptive_share(profiles) == pytest.approx(0.45)
    assert adaptive_share(profiles.abs()) == pytest.approx(0.7 - 0.5 / 4)


def test_expertweaver_always_computes_its_shared_experts() -> None:
    x, gate, _ = weights()
    stats = ProfileStatistics(gate, silu, 9)
    stats.add(x, torch.arange(T) // 100)
    found = expertweaver_layer(stats, gate, num_experts=15, active=6, seed=0)
    pinned = int(found.report["shared"])
    assert pinned == min(6, round(adaptive_share(stats.profiles_FN()) * 15))
    assert pinned > 0
    for count in (pinned, 2):
        rival = expertweaver_layer(stats, gate, num_experts=15, active=6, seed=0, shared=count)
        best = stats.mean_abs_F().argsort(descending=True)[: count * 4]
        always = rival.partition.experts_EM[:count].flatten()
        assert set(always.tolist()) == set(best.tolist())
        assert rival.partition.expert_size == 4
        tensors = {k.removeprefix("selector."): v for k, v in rival.selector.items()}
        scores = selector_scores("linear", tensors, x, 15, silu)
        index, _ = choose(scores, 6, False, balance_E=tensors["balance"])
        assert bool((index.sort(1).values[:, :count] == torch.arange(count)).all())
        # The others are chosen by the mean gate alone.
        rest = scores[:, count:].topk(6 - count).indices + count
        assert torch.equal(index.sort(1).values[:, count:], rest.sort(1).values)
    assert scores.abs().max() < PIN / 10
    with pytest.raises(ValueError, match="60 neurons, 14 experts"):
        expertweaver_layer(stats, gate, num_experts=14, active=6, seed=0)


def test_emoe_finds_planted_keys() -> None:
    rng = torch.Generator().manual_seed(1)
    centre = torch.linalg.qr(torch.randn(D, D, generator=rng)).Q[:5]
    labels = torch.arange(5).repeat(F // 5)
    noise = 0.05 * torch.randn(F, D, generator=rng)
    scale = 10 ** (torch.rand(F, 1, generator=rng) * 3 - 2)  # direction counts, not length
    keys = (centre[labels] + noise) * scale
    found = emoe_layer(keys, num_experts=5, seed=0)
    for e, index in enumerate(found.partition.experts_EM):
        assert len(labels[index].unique()) == 1
        torch.testing.assert_close(found.selector["selector.weight"][e], keys[index].mean(0))
    assert found.partition.shared_size == 0
    with pytest.raises(ValueError, match="60 neurons are not 7 x 8"):
        emoe_layer(keys, num_experts=7, seed=0)
