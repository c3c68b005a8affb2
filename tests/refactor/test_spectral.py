"""The spectral-mass router against its definition, neuron by neuron and token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fissile.models.routers_fissile import selector_scores
from fissile.refactor.partition import Partition, random_partition
from fissile.refactor.spectral import SpectralStatistics, spectral_selector

D, F, E, M, T = 10, 28, 3, 8, 3000
ACTIVATIONS = {"silu": torch.nn.functional.silu, "relu": torch.relu}


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor, Tensor, Partition]:
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=rng)
    x = torch.randn(T, D, generator=rng) @ mix + 0.5
    gate, up = torch.randn(2, F, D, generator=rng) / 3
    return x, gate, up, random_partition(torch.rand(F), shared_size=4, num_experts=E, seed=0)


def scores(selector: dict[str, Tensor], x: Tensor) -> Tensor:
    weights = {k.removeprefix("selector."): v for k, v in selector.items()}
    return selector_scores("spectral", weights, x, E, torch.nn.functional.silu)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_full_rank_is_the_definition(
    name: str, layer: tuple[Tensor, Tensor, Tensor, Partition]
) -> None:
    x, gate, up, partition = layer
    stats = SpectralStatistics(gate, ACTIVATIONS[name])
    for part in x.split(700):
        stats.add(part)
    x64, gate64, up64 = x.double(), gate.double(), up.double()
    z = x64 @ gate64.T
    opened = torch.sigmoid(z) if name == "silu" else (z > 0).double()
    p_F = opened.square().mean(0)
    torch.testing.assert_close(stats.openness_F(), p_F, rtol=1e-3, atol=1e-4)
    found = scores(spectral_selector(stats, gate, up, partition, M), x[:50])
    for e, index in enumerate(partition.expert_indices()):
        a = sum(p_F[i] * torch.outer(gate64[i], gate64[i]) for i in index.tolist())
        b = sum(torch.outer(up64[i], up64[i]) for i in index.tolist())
        for t in range(50):
            want = ((x64[t] @ a @ x64[t]) * (x64[t] @ b @ x64[t])).sqrt()
            assert found[t, e].item() == pytest.approx(float(want), rel=2e-3)


def test_low_rank_is_the_best_for_these_inputs(
    layer: tuple[Tensor, Tensor, Tensor, Partition],
) -> None:
    """Against whitening by hand: eigenvectors of C^1/2 B C^1/2, mapped back by C^-1/2."""
    x, gate, up, partition = layer
    stats = SpectralStatistics(gate, torch.nn.functional.silu)
    stats.add(x)
    rank = 2
    ours = spectral_selector(stats, gate, up, partition, rank)["selector.up"].double()
    moment = x.double().T @ x.double() / T
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ values.sqrt().diag() @ vectors.T
    inverse = torch.linalg.inv(root)
    for e, index in enumerate(partition.expert_indices()):
        form = up[index].double().T @ up[index].double()
        values, vectors = torch.linalg.eigh(root @ form @ root)
        kept = vectors[:, -rank:] @ values[-rank:].diag() @ vectors[:, -rank:].T
        want = inverse @ kept @ inverse
        own = ours[e * rank : (e + 1) * rank]
        torch.testing.assert_close(own.T @ own, want, rtol=1e-3, atol=1e-4)
        # The plain eigenvectors of the form, which know nothing of the inputs, hold less.
        plain = torch.linalg.eigh(form)
        blind = (plain.eigenvectors[:, -rank:] * plain.eigenvalues[-rank:].sqrt()).T
        assert (x.double() @ own.T).square().sum() > 1.02 * (x.double() @ blind.T).square().sum()


def test_bad_input(layer: tuple[Tensor, Tensor, Tensor, Partition]) -> None:
    _, gate, up, partition = layer
    stats = SpectralStatistics(gate, torch.nn.functional.silu)
    with pytest.raises(ValueError, match="no calibration tokens"):
        spectral_selector(stats, gate, up, partition, 2)
    with pytest.raises(ValueError, match=r"rank 9 is not in 1\.\.8"):
        spectral_selector(stats, gate, up, partition, 9)
    with pytest.raises(ValueError, match=r"x \(3, 11\) is not \(T, 10\)"):
        stats.add(torch.zeros(3, 11))
    with pytest.raises(ValueError, match="NaN or infinite"):
        stats.add(torch.full((3, D), torch.nan))
