"""The tile table against a table built token by token."""

from __future__ import annotations

import pytest
import torch

from fissile.kernels.route import RoutePlan, most_tiles, plan_routes, retile


def choices(
    tokens: int, top_k: int, experts: list[int], seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random choices among `experts` with random weights, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(experts), (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    weights[torch.rand(tokens, top_k, generator=generator) < 0.2] = 0
    return torch.tensor(experts)[picks], weights


def rows_by_hand(index: torch.Tensor, weights: torch.Tensor, experts: int) -> list[list[int]]:
    """Slots of each expert, in order."""
    flat, taken = index.flatten().tolist(), (weights.flatten() != 0).tolist()
    return [[s for s, e in enumerate(flat) if e == x and taken[s]] for x in range(experts)]


def rows_of(plan: RoutePlan, experts: int) -> list[list[int]]:
    """Slots of each expert as the tiles cover them; every tile lies within one expert."""
    found: list[list[int]] = [[] for _ in range(experts)]
    offsets, slot = plan.offsets.tolist(), plan.slot.tolist()
    for expert, begin in zip(plan.tile_expert.tolist(), plan.tile_begin.tolist(), strict=True):
        if expert >= 0:
            end = min(begin + plan.block, offsets[expert + 1])
            assert offsets[expert] <= begin < end
            found[expert] += slot[begin:end]
    return found


@pytest.mark.parametrize("block", [8, 16, 128])
@pytest.mark.parametrize(
    ("tokens", "top_k", "hit", "experts"),
    [(1, 1, [2], 4), (33, 2, [0, 2, 5], 8), (200, 1, [3], 4), (64, 4, [*range(16)], 16)],
)
def test_tiles_cover_every_taken_slot_once(
    tokens: int, top_k: int, hit: list[int], experts: int, block: int
) -> None:
    index, weights = choices(tokens, top_k, hit)
    plan = plan_routes(index, weights, experts, block)
    assert rows_of(plan, experts) == rows_by_hand(index, weights, experts)
    assert sorted(plan.slot.tolist()) == list(range(tokens * top_k))
    assert plan.top_k == top_k
    other = retile(plan, 32)
    assert rows_of(other, experts) == rows_by_hand(index, weights, experts)


def test_no_token_makes_no_tile() -> None:
    plan = plan_routes(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2), 4, 16)
    assert len(plan.tile_expert) == len(plan.slot) == 0
    assert plan.offsets.tolist() == [0, 0, 0, 0, 0]


def test_no_choice_taken_pads_the_table() -> None:
    plan = plan_routes(torch.tensor([[1], [3]]), torch.zeros(2, 1), 4, 8)
    assert set(plan.tile_expert.tolist()) == {-1}
    assert plan.offsets.tolist() == [0] * 5


@pytest.mark.parametrize(("rows", "experts", "block"), [(7, 4, 8), (100, 3, 16), (64, 64, 8)])
def test_the_grid_holds_the_worst_case_and_no_more(rows: int, experts: int, block: int) -> None:
    def most(left: int, groups: int) -> int:
        """Most tiles that `left` rows in at most `groups` groups can need."""
        if groups == 1:
            return -(-left // block)
        singles = min(groups - 1, max(left - 1, 0))
        return max(singles + -(-(left - singles) // block), -(-left // block))

    assert most_tiles(rows, experts, block) >= most(rows, experts)
    assert most_tiles(rows, experts, block) <= most(rows, experts) + 1
