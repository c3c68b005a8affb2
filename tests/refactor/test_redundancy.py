"""Mutual information of routing choices: known tables, invariants and the size of the bias."""

from __future__ import annotations

import math

import pytest
import torch

from fissile.refactor.redundancy import layer_redundancy, route_information


def test_a_table_worked_out_by_hand() -> None:
    # Counts (a, b): (0, 0) 3, (0, 1) 1, (1, 1) 4.
    a = torch.tensor([[0]] * 4 + [[1]] * 4)
    b = torch.tensor([[0]] * 3 + [[1]] * 5)
    found = route_information(a, b)
    h_b = -3 / 8 * math.log2(3 / 8) - 5 / 8 * math.log2(5 / 8)
    conditional = 0.5 * (-3 / 4 * math.log2(3 / 4) - 1 / 4 * math.log2(1 / 4))
    assert found.entropy_a == pytest.approx(1.0)
    assert found.entropy_b == pytest.approx(h_b)
    assert found.conditional == pytest.approx(conditional)
    assert found.information == pytest.approx(h_b - conditional)
    assert found.predictable == pytest.approx(7 / 8)
    # Supports 2, 2 and 3: the correction is (1 + 1 - 2) / 16 nats.
    assert found.corrected == pytest.approx(found.information)
    assert found.normalised == pytest.approx((h_b - conditional) / h_b)


def test_a_function_of_the_other_layer_is_fully_known() -> None:
    pairs = torch.combinations(torch.arange(8), 2)
    pick = torch.randint(0, 28, (60_000,), generator=torch.Generator().manual_seed(0))
    found = route_information(pairs[pick], pairs[(pick * 5 + 3) % 28])
    assert found.entropy_a == pytest.approx(math.log2(28), abs=1e-3)
    assert found.information == pytest.approx(found.entropy_b, abs=1e-9)
    assert found.normalised == pytest.approx(1.0, abs=1e-3)
    assert found.predictable == 1.0
    assert 0 < found.shuffled < 0.02  # 729 / (2 T ln 2) = 0.009
    assert found.conditional == pytest.approx(0.0, abs=1e-9)


def test_independent_layers_share_nothing_but_bias() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 20, (1500, 1), generator=rng) for _ in range(2))
    found = route_information(a, b)
    # Chi-square: the plug-in estimate is near (19 * 19) / (2 T ln 2).
    expected = 361 / (2 * 1500 * math.log(2))
    assert found.information == pytest.approx(expected, rel=0.25)
    assert found.shuffled == pytest.approx(expected, rel=0.25)
    assert found.corrected < 0.35 * found.information


def test_order_and_names_of_experts_do_not_matter() -> None:
    rng = torch.Generator().manual_seed(1)
    a = torch.rand(400, 6, generator=rng).argsort(1)[:, :2]
    b = torch.where(torch.rand(400, 1, generator=rng) < 0.7, a, 5 - a)
    reference = route_information(a, b)
    assert route_information(a.flip(1), b).information == pytest.approx(reference.information)
    renamed = torch.tensor([3, 1, 5, 0, 2, 4])[b]
    assert route_information(a, renamed).information == pytest.approx(reference.information)
    swapped = route_information(b, a)
    assert swapped.information == pytest.approx(reference.information)
    assert 0.3 < reference.normalised < 1.0


def test_more_experts_than_bits() -> None:
    a = torch.rand(400, 70, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :1]
    few = torch.unique(a, return_inverse=True)[1] % 40
    found, same = route_information(a, a.flip(0)), route_information(a + 500, a.flip(0) + 500)
    assert found == same
    assert route_information(a + 500, few).predictable == 1.0


def test_layers_in_a_row() -> None:
    rng = torch.Generator().manual_seed(2)
    first = torch.randint(0, 4, (500, 1), generator=rng)
    found = layer_redundancy([first, first, torch.zeros_like(first)])
    assert len(found) == 2
    assert found[0].predictable == 1.0
    assert (found[1].information, found[1].normalised) == (0.0, 0.0)
    with pytest.raises(ValueError, match="500 and 499 tokens"):
        route_information(first, first[1:])
