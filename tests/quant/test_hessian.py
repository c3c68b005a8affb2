"""Streamed second moments against direct float64 sums."""

from __future__ import annotations

import pytest
import torch

from fissile.quant.hessian import HessianAccumulator, shrink


def tokens(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * torch.logspace(-2, 1, dim) + 0.3


def test_stream_equals_the_direct_sum() -> None:
    x = tokens(700, 24)
    accumulator = HessianAccumulator(24)
    for piece in (x[:1].view(1, 1, 24), x[1:300].bfloat16(), x[300:]):
        accumulator.add(piece)
    x[1:300] = x[1:300].bfloat16().float()
    mean, count = accumulator.finish()
    want = x.double().T @ x.double() / 700
    assert count == 700
    assert (mean - want).norm() / want.norm() < 1e-6


def test_sums_do_not_drift_over_many_small_calls() -> None:
    x = tokens(4000, 8)
    accumulator = HessianAccumulator(8)
    for row in x:
        accumulator.add(row[None])
    want = x.double().T @ x.double() / 4000
    assert (accumulator.finish()[0] - want).norm() / want.norm() < 2e-7


def test_a_batch_without_tokens_changes_nothing() -> None:
    x, index = tokens(50, 8), torch.arange(50) % 3
    plain, padded = HessianAccumulator(8, (3,)), HessianAccumulator(8, (3,))
    plain.add(x, index)
    padded.add(x[:0], index[:0])
    padded.add(x, index)
    assert torch.equal(plain.finish()[0], padded.finish()[0])


@pytest.mark.parametrize("chosen", [1, 2])
def test_every_expert_sees_its_own_tokens(chosen: int) -> None:
    experts, x = 5, tokens(300, 12)
    generator = torch.Generator().manual_seed(3)
    index = torch.stack([torch.randperm(4, generator=generator)[:chosen] for _ in range(300)])
    index[::7] = -1  # expert 4 is never chosen, some tokens go nowhere
    accumulator = HessianAccumulator(12, (experts,))
    accumulator.add(x[:100], index[:100])
    accumulator.add(x[100:], index[100:, 0] if chosen == 1 else index[100:])
    mean, counts = accumulator.finish()
    for expert in range(experts):
        mine = x[(index == expert).any(1)].double()
        assert counts[expert] == len(mine)
        want = mine.T @ mine / max(len(mine), 1)
        assert (mean[expert] - want).norm() <= 1e-6 * want.norm()
    assert counts[4] == 0


@pytest.mark.parametrize(
    ("batch", "x", "index", "message"),
    [
        ((), torch.zeros(3, 5), None, "width 5, accepted: 4"),
        ((), torch.full((3, 4), torch.nan), None, "not finite"),
        ((2,), torch.zeros(3, 4), None, "index is missing"),
        ((), torch.zeros(3, 4), torch.zeros(3, 1), "index is given"),
        ((2,), torch.zeros(3, 4), torch.zeros(2, 1), "index has shape"),
        ((2,), torch.zeros(3, 4), torch.full((3, 1), 2), "index holds 2 to 2"),
    ],
)
def test_misuse_is_named(
    batch: tuple[int, ...], x: torch.Tensor, index: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HessianAccumulator(4, batch).add(x, index)


def test_shrinking_trusts_an_expert_as_far_as_its_tokens_go() -> None:
    own = torch.stack([torch.eye(8) * value for value in (1.0, 1.0, 1.0)])
    layer = torch.full((8, 8), 2.0)
    shrunk = shrink(own, torch.tensor([0, 8, 8 * 999]), layer)
    assert torch.allclose(shrunk[0], layer)
    assert torch.allclose(shrunk[1], 0.5 * own[1] + 0.5 * layer)
    assert torch.allclose(shrunk[2], 0.999 * own[2] + 0.001 * layer)
    with pytest.raises(ValueError, match="do not fit"):
        shrink(own, torch.tensor([1, 2]), layer)
