"""The division of a layer between both devices, against every possible division."""

from __future__ import annotations

import itertools
import random

import pytest

from fissile.serve.executors import Costs, Work, evaluate, gpu_only, split_work
from fissile.serve.hardware import Hardware


def costs(gpu: float, move: float, cpu: float, start: float = 0.0) -> Costs:
    """Seconds of an expert, of bringing it, and of a token on the CPU."""
    hardware = Hardware(
        name="toy",
        flops=1e30,
        memory_bandwidth=1 / gpu,
        link_bandwidth=1 / move,
        cpu_flops=1 / cpu,
        cpu_bandwidth=1e30,
        cpu_start=start,
    )
    return Costs(hardware, 1.0, 1.0)


def every_division(work: list[Work], toy: Costs, link_free: float) -> float:
    """Shortest time of all divisions; the link brings the most tokens first."""
    names = [w.expert for w in sorted(work, key=lambda w: -w.tokens)]
    times = []
    for sides in itertools.product((True, False), repeat=len(names)):
        gpu = [n for n, side in zip(names, sides, strict=True) if side]
        cpu = [n for n, side in zip(names, sides, strict=True) if not side]
        times.append(evaluate(gpu, cpu, work, toy, link_free).end)
    return min(times)


@pytest.mark.parametrize("seed", range(8))
def test_never_worse_than_one_device_and_near_the_best_division(seed: int) -> None:
    rng = random.Random(seed)
    ratios = []
    for _ in range(40):
        toy = costs(rng.uniform(0.1, 2), rng.uniform(0.1, 4), rng.uniform(0.05, 1), rng.random())
        work = [
            Work(e, rng.randint(1, 30), 0.0 if rng.random() < 0.5 else None)
            for e in range(rng.randint(1, 8))
        ]
        link_free = rng.choice([0.0, 3 * rng.random()])
        found = split_work(work, toy, link_free)
        alone = evaluate((), [w.expert for w in work], work, toy, link_free)
        assert found.end <= min(gpu_only(work, toy, link_free).end, alone.end)
        assert sorted(found.gpu + found.cpu) == sorted(w.expert for w in work)
        absent = {w.expert for w in work if w.ready is None}
        assert set(found.moved) == absent & set(found.gpu)
        best = every_division(work, toy, link_free)
        assert found.end >= best - 1e-12
        ratios.append(found.end / best)
    assert sum(ratios) / len(ratios) < 1.1
    assert min(ratios) < 1 + 1e-9


def test_both_devices_share_as_hybrimoe_describes() -> None:
    """The CPU takes the cached expert with few tokens while the GPU takes a busy one that is
    brought over the link."""
    work = [Work(0, 1, 0.0), Work(1, 4, 0.0), Work(2, 5, None)]
    found = split_work(work, costs(gpu=1.0, move=1.5, cpu=1.2))
    assert found.cpu == (0,)
    assert found.gpu == (1, 2)
    assert found.moved == (2,)
    assert found.end == pytest.approx(2.5)


def test_time_of_a_division_by_hand() -> None:
    work = [Work(0, 2, 0.0), Work(1, 3, None), Work(2, 1, 0.7), Work(3, 4, None)]
    toy = costs(gpu=0.5, move=2.0, cpu=0.25, start=0.1)
    found = evaluate([3, 0, 2], [1], work, toy, link_free=1.0)
    # 0: 0 to 0.5; 2: 0.7 to 1.2; 3 is there at 3.0, done at 3.5; the CPU: 0.1 + 3 * 0.25.
    assert found.gpu == (0, 2, 3)
    assert found.end == pytest.approx(3.5)
    assert evaluate([0, 2], [1, 3], work, toy).end == pytest.approx(0.1 + 7 * 0.25)
