"""Split weights compute what the dense FFN computes, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from fissile.refactor.domains import domain_masks, membership_partition
from fissile.refactor.partition import Partition, random_partition
from fissile.refactor.split import (
    merge_gated_mlp,
    split_gated_mlp,
    split_membership_mlp,
    take_neurons,
)

D, F, T = 7, 44, 30
Weights = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def weights() -> Weights:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    return normal(F, D), normal(F, D), normal(D, F)


@pytest.fixture
def x_TD() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def named(tensors: dict[str, Tensor], name: str) -> Weights:
    gate, up, down = (tensors[f"{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
    return gate, up, down


@pytest.mark.parametrize(("shared", "experts"), [(0, 4), (8, 4), (24, 5), (40, 1)])
def test_sum_of_all_experts_is_the_dense_ffn(
    weights: Weights, x_TD: Tensor, shared: int, experts: int
) -> None:
    partition = random_partition(torch.rand(F), shared_size=shared, num_experts=experts, seed=0)
    tensors = split_gated_mlp(*weights, partition)
    size = (F - shared) // experts
    assert tensors["experts.gate_up_proj"].shape == (experts, 2 * size, D)
    assert tensors["experts.down_proj"].shape == (experts, D, size)
    total = ffn(x_TD, *named(tensors, "shared")) if shared else torch.zeros_like(x_TD)
    parts = zip(tensors["experts.gate_up_proj"], tensors["experts.down_proj"], strict=True)
    for index, (gate_up, down) in zip(partition.experts_EM, parts, strict=True):
        gate, up = gate_up.chunk(2)
        part = ffn(x_TD, gate, up, down)
        expected = ffn(x_TD, weights[0][index], weights[1][index], weights[2][:, index])
        torch.testing.assert_close(part, expected)
        total = total + part
    dense = ffn(x_TD, *weights)
    assert ((total - dense).norm() / dense.norm()).item() < 1e-12
    assert ("shared.gate_proj.weight" in tensors) == (shared > 0)
    assert all(t.is_contiguous() for t in tensors.values())


@pytest.mark.parametrize("shared", [0, 4, 44])
def test_merge_is_the_inverse(weights: Weights, shared: int) -> None:
    partition = random_partition(torch.rand(F), shared_size=shared, num_experts=4, seed=1)
    merged = merge_gated_mlp(split_gated_mlp(*weights, partition), partition)
    for found, expected in zip(merged, weights, strict=True):
        assert torch.equal(found, expected)


def test_overlapping_experts_are_masks_on_the_dense_ffn(weights: Weights, x_TD: Tensor) -> None:
    gate, up, down = weights
    keep_NF = domain_masks(torch.rand(3, F, generator=torch.Generator().manual_seed(2)), 22)
    partition = membership_partition(keep_NF)
    tensors = split_membership_mlp(*weights, partition)
    always = ffn(x_TD, *named(tensors, "shared"))
    pool_gate, pool_up, pool_down = named(tensors, "pool")
    assert len(pool_gate) == sum(size for size, _ in partition.blocks)
    for e in range(3):
        member = torch.cat([torch.full((size,), e in ids) for size, ids in partition.blocks])
        own = ffn(x_TD, pool_gate[member], pool_up[member], pool_down[:, member])
        masked = (silu(x_TD @ gate.T) * (x_TD @ up.T) * keep_NF[e]) @ down.T
        torch.testing.assert_close(always + own, masked, rtol=1e-12, atol=1e-12)


def test_taking_neurons(weights: Weights, x_TD: Tensor) -> None:
    gate, up, down = weights
    index = torch.tensor([4, 1, 30])
    found = ffn(x_TD, *named(take_neurons(gate, up, down, index), "shared"))
    keep = torch.zeros(F, dtype=torch.float64).index_fill(0, index, 1)
    masked = (silu(x_TD @ gate.T) * (x_TD @ up.T) * keep) @ down.T
    torch.testing.assert_close(found, masked, rtol=1e-12, atol=1e-12)


def test_wrong_shapes_are_refused(weights: Weights) -> None:
    gate, up, down = weights
    partition = Partition(torch.arange(F), 4, 10, 4)
    with pytest.raises(ValueError, match=r"\(F, D\), \(F, D\), \(D, F\)"):
        split_gated_mlp(gate, up, down.T, partition)
    with pytest.raises(ValueError, match="partition of 44 neurons for 43"):
        split_gated_mlp(gate[1:], up[1:], down[:, 1:], partition)
