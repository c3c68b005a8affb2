"""Expert sizes against a brute-force search over all divisions."""

from __future__ import annotations

import random

import pytest

from fissile.errors import RecipeError
from fissile.families import expert_sizes, fitting_group


def best_by_search(ffn: int, experts: int, top_k: int, share: float, multiple: int) -> float:
    """Smallest possible distance of the active share from the wanted one."""
    found = []
    for expert in range(multiple, ffn // experts + 1, multiple):
        shared = ffn - experts * expert
        found.append(abs((shared + top_k * expert) / ffn - share))
    return min(found)


def test_known_division() -> None:
    sizes = expert_sizes(1024, 8, 3, 0.75, 1)
    assert (sizes.expert, sizes.shared, sizes.num_experts) == (51, 616, 8)
    assert sizes.active_share == pytest.approx((616 + 3 * 51) / 1024)
    assert expert_sizes(11008, 8, 3, 0.75, 64).expert == 576


def test_divisions_are_the_nearest_possible() -> None:
    generator, solved = random.Random(0), 0
    for _ in range(2000):
        ffn = generator.choice([96, 256, 1000, 5632, 11008])
        experts = generator.choice([2, 4, 7, 8, 16])
        top_k = generator.randint(1, experts - 1)
        share = generator.uniform(0.05, 0.99)
        multiple = generator.choice([1, 8, 64])
        try:
            sizes = expert_sizes(ffn, experts, top_k, share, multiple)
        except RecipeError:
            continue
        solved += 1
        assert sizes.shared + experts * sizes.expert == ffn
        assert sizes.shared >= 0
        assert sizes.expert % multiple == 0
        assert sizes.expert > 0
        assert sizes.active_share == (sizes.shared + top_k * sizes.expert) / ffn
        distance = abs(sizes.active_share - share)
        assert distance <= best_by_search(ffn, experts, top_k, share, multiple) + 1e-12
    assert solved > 800


def test_impossible_shares_say_what_is_possible() -> None:
    with pytest.raises(RecipeError, match=r"1024 \* 0\.95 / 5 = 195 neurons.* only up to 128") as e:
        expert_sizes(1024, 8, 3, 0.05, 64)
    lowest = float(str(e.value).partition("raise active_share to ")[2].split()[0])
    assert expert_sizes(1024, 8, 3, lowest, 64).shared == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((256, 8, 3, 0.5, 64), "8 experts of at least 64 neurons need 512, the FFN has 256"),
        ((1024, 8, 8, 0.75, 1), "lower both active_share and top_k"),
        ((1024, 8, 3, 1.0, 1), "contradict"),
        ((1024, 8, 9, 0.5, 1), "top_k 9 must be between 1 and num_experts 8"),
    ],
)
def test_contradictions(arguments: tuple[int, int, int, float, int], expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        expert_sizes(*arguments)


def test_all_experts_chosen_is_a_dense_model() -> None:
    sizes = expert_sizes(1000, 8, 8, 1.0, 64)
    assert (sizes.expert, sizes.shared, sizes.active_share) == (64, 488, 1.0)


@pytest.mark.parametrize(
    ("inputs", "preferred", "group"),
    [(256, 64, 64), (96, 64, 32), (24, 128, None), (32, 128, 32), (48, 32, None), (192, 128, 64)],
)
def test_fitting_group(inputs: int, preferred: int, group: int | None) -> None:
    assert fitting_group(inputs, preferred) == group
