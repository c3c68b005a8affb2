"""Streaming statistics against numpy in float64 on the whole matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fissile.refactor.statistics import (
    NeuronStatistics,
    Score,
    column_norms,
    count_largest,
    token_signs,
)

T, F, D, N, Q = 700, 12, 5, 3, 40


@pytest.fixture
def h_TF() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 3, F)
    return torch.randn(T, F, generator=rng) * scale + torch.linspace(-1, 1, F)


@pytest.fixture
def domain_T() -> Tensor:
    return torch.randint(0, N, (T,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def down_DF() -> Tensor:
    return torch.randn(D, F, generator=torch.Generator().manual_seed(2))


def gather(
    h_TF: Tensor, domain_T: Tensor, down_DF: Tensor, cuts: tuple[int, ...] = (), **setup: int
) -> NeuronStatistics:
    setup = {"domains": N, "sketch_dim": Q, "seed": 7, "top": 2} | setup
    stats = NeuronStatistics(column_norms(down_DF), **setup)
    bounds = [0, *cuts, len(h_TF)]
    for begin, end in itertools.pairwise(bounds):
        stats.add(h_TF[begin:end], domain_T[begin:end], torch.arange(begin, end))
    return stats


def test_sums_per_domain(h_TF: Tensor, domain_T: Tensor, down_DF: Tensor) -> None:
    stats = gather(h_TF, domain_T, down_DF)
    h, labels = h_TF.double().numpy(), domain_T.numpy()
    for n in range(N):
        rows = h[labels == n]
        assert int(stats.tokens_N[n]) == len(rows)
        size = np.abs(rows).mean(0)
        weight = np.linalg.norm(down_DF.double().numpy(), axis=0)
        by_hand: dict[Score, np.ndarray] = {
            "magnitude": size,
            "contribution": size * weight,
            "energy": (rows**2).mean(0) * weight**2,
            "fluctuation": rows.var(0) * weight**2,
        }
        for kind, wanted in by_hand.items():
            np.testing.assert_allclose(stats.domain_scores(kind)[n], wanted, rtol=1e-5)
        np.testing.assert_allclose(stats.domain_scores()[n], size, rtol=1e-12)
        np.testing.assert_allclose(stats.sum_NF[n], rows.sum(0), rtol=1e-9)
        np.testing.assert_allclose(stats.square_NF[n], (rows**2).sum(0), rtol=1e-12)
    np.testing.assert_allclose(stats.mean_F(), h.mean(0), rtol=1e-12)


def test_scores(h_TF: Tensor, domain_T: Tensor, down_DF: Tensor) -> None:
    stats = gather(h_TF, domain_T, down_DF)
    h, norm = h_TF.double().numpy(), np.linalg.norm(down_DF.double().numpy(), axis=0)
    top = np.argsort(-np.abs(h) * norm, axis=1)[:, :2]
    expected = {
        "fluctuation": h.var(0) * norm**2,
        "energy": (h**2).mean(0) * norm**2,
        "contribution": np.abs(h).mean(0) * norm,
        "magnitude": np.abs(h).mean(0),
        "rate": np.bincount(top.ravel(), minlength=F) / T,
    }
    for kind, value in expected.items():
        np.testing.assert_allclose(stats.score(kind), value, rtol=1e-10, err_msg=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score 'flap' is not one of fluctuation, energy"):
        stats.score("flap")  # type: ignore[arg-type]


def test_small_variance_beside_a_large_mean(down_DF: Tensor) -> None:
    h = torch.randn(4000, F, generator=torch.Generator().manual_seed(3)) + 1e4
    stats = gather(h, torch.zeros(4000, dtype=torch.int64), down_DF)
    expected = h.double().numpy().var(0) * stats.down_norm_F.numpy() ** 2
    np.testing.assert_allclose(stats.score("fluctuation"), expected, rtol=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (256, 512), (699,)])
def test_chunks_do_not_matter(
    h_TF: Tensor, domain_T: Tensor, down_DF: Tensor, cuts: tuple[int, ...]
) -> None:
    whole, pieces = (gather(h_TF, domain_T, down_DF, c) for c in ((), cuts))
    for name, value in whole.state().items():
        torch.testing.assert_close(pieces.state()[name], value, rtol=1e-5, atol=1e-4)


def test_merge_and_state(h_TF: Tensor, domain_T: Tensor, down_DF: Tensor) -> None:
    whole = gather(h_TF, domain_T, down_DF, (300,))
    first = gather(h_TF[:300], domain_T[:300], down_DF)
    second = NeuronStatistics(column_norms(down_DF), domains=N, sketch_dim=Q, seed=7, top=2)
    second.add(h_TF[300:], domain_T[300:], torch.arange(300, T))
    restored = NeuronStatistics.from_state(first.state())
    restored.merge(second)
    for name, value in whole.state().items():
        assert torch.equal(restored.state()[name], value), name
    assert first.tokens == 300  # the restored copy shares no memory
    with pytest.raises(ValueError, match="different seed"):
        whole.merge(gather(h_TF, domain_T, down_DF, seed=8))


def test_signs_are_balanced_uncorrelated_and_reproducible() -> None:
    signs = token_signs(torch.arange(20_000), 70, seed=0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean(0).abs().max() < 5 / 20_000**0.5
    gram = signs.T @ signs / 20_000 - torch.eye(70)
    assert gram.abs().max() < 6 / 20_000**0.5
    neighbours = (signs[1:] * signs[:-1]).mean(0)
    assert neighbours.abs().max() < 5 / 20_000**0.5
    assert torch.equal(token_signs(torch.tensor([19, 3]), 70, seed=0), signs[[19, 3]])
    other = token_signs(torch.arange(20_000), 70, seed=1)
    assert (other * signs).mean().abs() < 5 / (70 * 20_000) ** 0.5


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("of", ["signed", "magnitude"])
def test_features_estimate_second_moments(
    h_TF: Tensor, domain_T: Tensor, down_DF: Tensor, of: str, centred: bool
) -> None:
    stats = gather(h_TF, domain_T, down_DF, sketch_dim=4096)
    profile = h_TF.double() if of == "signed" else h_TF.double().abs()
    profile = (profile - profile.mean(0) * centred) * stats.down_norm_F
    expected = profile.T @ profile / T
    found = stats.features(of=of, centred=centred)  # type: ignore[arg-type]
    scale = expected.diagonal().sqrt()
    error = (found @ found.T - expected) / torch.outer(scale, scale)
    assert error.abs().max() < 6 / 4096**0.5


def test_bad_input(h_TF: Tensor, domain_T: Tensor, down_DF: Tensor) -> None:
    stats = gather(h_TF[:0], domain_T[:0], down_DF)
    with pytest.raises(ValueError, match="no calibration tokens were added"):
        stats.score("energy")
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.2"):
        stats.add(h_TF, domain_T + 1, torch.arange(T))
    with pytest.raises(ValueError, match=r"is not \(T, 12\)"):
        stats.add(h_TF[:, :5], domain_T, torch.arange(T))
    with pytest.raises(ValueError, match="NaN or infinite"):
        stats.add(h_TF.index_fill(0, torch.tensor([4]), torch.nan), domain_T, torch.arange(T))
    stats = gather(h_TF, domain_T.clamp_max(1), down_DF)
    with pytest.raises(ValueError, match="no calibration tokens of domain 2"):
        stats.domain_scores()
    with pytest.raises(ValueError, match="'rate' is not"):
        gather(h_TF, domain_T, down_DF).domain_scores("rate")


def test_equal_values_are_counted_only_as_far_as_there_is_room() -> None:
    size = torch.tensor([[5.0, 1.0, 1.0, 1.0, 0.5], [0.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]])
    found = count_largest(size, 2)
    assert found.sum() == 6
    assert (found[0], found[4]) == (1 + found_of_zeros(size, 0), 1 + found_of_zeros(size, 4))
    assert count_largest(size[2:], 2).tolist() == [0, 0, 0, 1, 1]
    assert count_largest(size[:1], 2).sum() == 2


def found_of_zeros(size: Tensor, column: int) -> float:
    """What the row of zeros adds to a column: any two of the five, but the same two each time."""
    return float(count_largest(size[1:2], 2)[column])
