"""Read-ME's overlapping masks against plain Python sets."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fissile.refactor.domains import (
    MembershipPartition,
    domain_masks,
    membership_partition,
    overlap,
)


@pytest.fixture
def keep_NF() -> Tensor:
    mean_abs = torch.rand(4, 60, generator=torch.Generator().manual_seed(0))
    mean_abs[:, :9] += 1  # kept by every domain
    mean_abs[:, -5:] = 0  # by none
    return domain_masks(mean_abs, 30)


def test_masks_keep_exactly_the_largest() -> None:
    mean_abs = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert domain_masks(mean_abs, 2).tolist() == [
        [True, False, True, False, False],  # ties go to the lower index
        [True, True, False, False, False],
    ]
    with pytest.raises(ValueError, match=r"size 6 is not in 1\.\.5"):
        domain_masks(mean_abs, 6)


def test_layout_holds_every_expert_once(keep_NF: Tensor) -> None:
    partition = membership_partition(keep_NF)
    sets = [set(torch.nonzero(row).flatten().tolist()) for row in keep_NF]
    permanent = set.intersection(*sets)
    assert set(range(9)) <= permanent
    assert set(partition.shared.tolist()) == permanent
    assert sorted(partition.order_P.tolist()) == sorted(set.union(*sets))
    for e, index in enumerate(partition.expert_indices()):
        assert len(index) == 30 - len(permanent)
        assert set(index.tolist()) | permanent == sets[e]
    begin = partition.shared_size
    for size, members in partition.blocks:
        for neuron in partition.order_P[begin : begin + size].tolist():
            assert [e for e in range(4) if neuron in sets[e]] == list(members)
        begin += size
    assert len({members for _, members in partition.blocks}) == len(partition.blocks)


def test_neighbouring_blocks_differ_in_one_expert() -> None:
    patterns = list(itertools.product([False, True], repeat=4))
    partition = membership_partition(torch.tensor(patterns).T)
    members = [set(ids) for _, ids in partition.blocks]
    assert len(members) == 14  # all but none and everyone
    steps = [len(a ^ b) for a, b in itertools.pairwise(members)]
    assert sorted(steps) == [1] * 12 + [2]  # 2 where "everyone" was taken out


def test_state_and_extremes(keep_NF: Tensor) -> None:
    partition = membership_partition(keep_NF)
    again = MembershipPartition.from_state(partition.state())
    assert again.blocks == partition.blocks
    assert torch.equal(again.order_P, partition.order_P)
    assert (again.shared_size, again.num_experts) == (partition.shared_size, 4)
    equal = membership_partition(keep_NF[:1].expand(3, -1))
    assert (equal.shared_size, equal.blocks) == (30, ())
    assert [len(index) for index in equal.expert_indices()] == [0, 0, 0]
    restored = MembershipPartition.from_state(equal.state())
    assert (restored.shared_size, restored.blocks, restored.num_experts) == (30, (), 3)


def test_overlap(keep_NF: Tensor) -> None:
    found = overlap(keep_NF)
    sets = [set(torch.nonzero(row).flatten().tolist()) for row in keep_NF]
    for a, b in itertools.product(range(4), repeat=2):
        expected = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        assert found.jaccard_NN[a, b].item() == pytest.approx(expected)
    assert found.permanent == len(set.intersection(*sets))
    assert (found.union, found.width) == (len(set.union(*sets)), 60)


def test_membership_checks_itself() -> None:
    order = torch.arange(6)
    with pytest.raises(ValueError, match="not the 6 kept ones"):
        MembershipPartition(order, 2, ((3, (0,)),), 2)
    with pytest.raises(ValueError, match=r"block of experts \(2,\): known are 0\.\.1"):
        MembershipPartition(order, 2, ((4, (2,)),), 2)
    with pytest.raises(ValueError, match="distinct int64"):
        MembershipPartition(order.clamp_max(4), 2, ((4, (0,)),), 2)
