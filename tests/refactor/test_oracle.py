"""Expert norms against a plain loop; routing metrics against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fissile.refactor.domains import domain_masks, membership_partition
from fissile.refactor.oracle import (
    HasExperts,
    chosen_mask,
    expert_norms,
    router_quality,
    routing_report,
    switch_rate,
    top_experts,
)
from fissile.refactor.partition import random_partition

T, F = 40, 36


def partitions() -> dict[str, HasExperts]:
    masks = domain_masks(torch.rand(3, F, generator=torch.Generator().manual_seed(0)), 18)
    return {
        "disjoint": random_partition(torch.rand(F), shared_size=6, num_experts=5, seed=0),
        "overlapping": membership_partition(masks),
    }


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("width", [3, 64])  # narrower and wider than an expert
@pytest.mark.parametrize("kind", ["disjoint", "overlapping"])
def test_norms(kind: str, width: int, centred: bool) -> None:
    partition = partitions()[kind]
    rng = torch.Generator().manual_seed(1)
    h_TF = torch.randn(T, F, generator=rng) + 0.5
    down_DF = torch.randn(width, F, generator=rng)
    mean_F = h_TF.mean(0) if centred else None
    found = expert_norms(h_TF, down_DF, partition, mean_F)
    h64 = h_TF.double() - h_TF.double().mean(0) * centred
    for e, index in enumerate(partition.expert_indices()):
        for t in range(T):
            y_D = sum(h64[t, i] * down_DF[:, i].double() for i in index.tolist())
            assert isinstance(y_D, torch.Tensor)
            assert found[t, e].item() == pytest.approx(y_D.norm().item(), rel=2e-5)


def test_norms_keep_their_precision_when_outputs_cancel() -> None:
    partition = random_partition(torch.rand(8), shared_size=0, num_experts=2, seed=0)
    down_DF = torch.zeros(16, 8)
    for pair in (index.view(-1, 2) for index in partition.expert_indices()):
        for i, j in pair.tolist():
            down_DF[i], down_DF[i, j] = 1000.0 * (torch.arange(8) == i), -1000.0
    down_DF[0] += 1e-3  # what is left once the large terms have cancelled
    found = expert_norms(torch.ones(1, 8), down_DF, partition)
    expected = [down_DF[:, i].double().sum(1).norm() for i in partition.expert_indices()]
    torch.testing.assert_close(found[0].double(), torch.stack(expected), rtol=0.05, atol=0)


def test_top_experts_breaks_ties_by_index() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert top_experts(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert chosen_mask(top_experts(scores, 1), 4).tolist() == [
        [False, True, False, False],
        [True, False, False, False],
    ]
    with pytest.raises(ValueError, match=r"k 5 is not in 1\.\.4"):
        top_experts(scores, 5)


def test_report_by_hand() -> None:
    norms = torch.tensor([[4.0, 3.0, 2.0], [1.0, 5.0, 3.0], [6.0, 1.0, 1.5], [2.0, 2.5, 0.5]])
    choices = torch.tensor([[0, 1], [0, 1], [2, 0], [2, 1]])
    report = routing_report(
        choices,
        norms,
        domain_T=torch.tensor([0, 0, 2, 2]),
        domains=3,
        sequence_T=torch.tensor([0, 0, 0, 1]),
    )
    # The oracle takes {0, 1}, {1, 2}, {0, 2}, {0, 1}.
    assert report.recall == pytest.approx(6 / 8)
    assert report.exact == pytest.approx(2 / 4)
    assert report.mass == pytest.approx((7 + 6 + 7.5 + 3) / (7 + 8 + 7.5 + 4.5))
    assert report.load_E.tolist() == pytest.approx([3 / 8, 3 / 8, 2 / 8])
    assert report.entropy == pytest.approx(-0.75 * math.log(3 / 8) - 0.25 * math.log(1 / 4))
    assert report.imbalance == pytest.approx(9 / 8)
    assert report.switch_rate == pytest.approx(1 / 2)  # the last pair spans two sequences
    assert report.domain_NE[0].tolist() == [1.0, 1.0, 0.0]
    assert report.domain_NE[2].tolist() == [0.5, 0.5, 1.0]
    assert report.domain_NE[1].isnan().all()


def test_the_oracle_agrees_with_itself() -> None:
    norms = torch.rand(200, 8, generator=torch.Generator().manual_seed(0))
    label = torch.arange(200) % 2
    report = routing_report(
        top_experts(norms, 3), norms, domain_T=label, domains=2, sequence_T=torch.zeros(200)
    )
    assert (report.recall, report.exact, report.mass) == (1.0, 1.0, 1.0)
    assert report.domain_NE.sum(1).tolist() == pytest.approx([3.0, 3.0])
    assert report.load_E.sum().item() == pytest.approx(1.0)
    worst = routing_report(
        top_experts(-norms, 3), norms, domain_T=label, domains=2, sequence_T=torch.zeros(200)
    )
    assert worst.mass < 0.5
    assert worst.recall == 0.0


def test_switch_rate_of_single_tokens_is_undefined() -> None:
    chosen = torch.eye(3, dtype=torch.bool)
    assert math.isnan(switch_rate(chosen, torch.arange(3)))
    assert switch_rate(chosen, torch.zeros(3)) == 1.0
    with pytest.raises(ValueError, match="4 > 0 tokens"):
        routing_report(
            torch.zeros(4, 1, dtype=torch.int64),
            torch.rand(4, 3),
            domain_T=torch.zeros(3, dtype=torch.int64),
            domains=1,
            sequence_T=torch.zeros(4),
        )


@pytest.mark.parametrize("width", [150, 151, 149, 400])
def test_norms_of_wide_experts(width: int) -> None:
    """Experts as wide as the model, one neuron wider and narrower; factors in several blocks."""
    rng = torch.Generator().manual_seed(2)
    partition = random_partition(
        torch.rand(310, generator=rng), shared_size=10, num_experts=2, seed=0
    )
    h_TF = torch.randn(300, 310, generator=rng)
    down_DF = torch.randn(width, 310, generator=rng)
    found = expert_norms(h_TF, down_DF, partition)
    for e, index in enumerate(partition.expert_indices()):
        expected = (h_TF[:, index].double() @ down_DF[:, index].double().T).norm(dim=1)
        torch.testing.assert_close(found[:, e].double(), expected, rtol=2e-5, atol=0)


def test_fewer_choices_than_slots() -> None:
    mask = chosen_mask(torch.tensor([[2, -1], [0, 1]]), 3)
    assert mask.tolist() == [[False, False, True], [True, True, False]]


def test_quality_of_every_layer() -> None:
    norms = torch.tensor([[[4.0, 3.0, 1.0], [1.0, 5.0, 2.0]], [[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]])
    best, worst = torch.tensor([[0], [1]]), torch.tensor([[2], [0]])
    sequence = torch.zeros(2, dtype=torch.int64)
    found = router_quality([best, worst], norms, sequence)
    assert found["recall_at_k"] == [1.0, 1.0]
    assert router_quality([best], norms, sequence)["recall_at_k"] == [1.0, 0.0]
    other = router_quality([worst, worst[:1].repeat(2, 1)], norms, sequence)
    assert other["recall_at_k"] == [0.0, 0.5]
    assert other["mass"] == pytest.approx([2 / 9, 5 / 6])
    assert other["switch_rate"] == [1.0, 0.0]
    assert other["entropy"] == pytest.approx([math.log(2) / math.log(3), 0.0])
    assert other["imbalance"] == pytest.approx([1.5, 3.0])
    with pytest.raises(ValueError, match="3 decisions for 2 layers"):
        router_quality([best] * 3, norms, sequence)
