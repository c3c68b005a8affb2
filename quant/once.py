"""Once for all: one set of codes trained at many widths, then the best mix for a budget.

Every step draws a width for each weight, so that all mixes are trained; a mean that falls and rises
in triangles makes sure that the narrowest and the widest are among them, which a uniform draw
misses (its mean hardly varies over many weights). One QuantLLM for ALL, arXiv 2405.20202, sections
3.2 and 3.3; the draw with a given mean is the one of largest entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from fissile.errors import UsageError

_HALVINGS = 100


def mean_bits(step: int, period: int, widths: Sequence[int]) -> float:
    """Mean width of a step: from the widest down to the narrowest and back, once a period.

    Args:
        step: from 0.
        period: in steps, at least 2.
        widths: ascending.
    """
    wave = abs(2 * (step % period) / period - 1)
    return widths[0] + (widths[-1] - widths[0]) * wave


def width_shares(mean: float, widths: Sequence[int]) -> list[float]:
    """The distribution of largest entropy with a mean: p_k in proportion to exp(theta k).

    Args:
        mean: between the narrowest and the widest.
        widths: ascending.

    Raises:
        ValueError: no distribution has this mean.
    """
    if not widths[0] <= mean <= widths[-1]:
        raise ValueError(f"mean {mean} of widths {list(widths)}")

    def shares(theta: float) -> list[float]:
        high = max(theta * k for k in widths)
        raw = [math.exp(theta * k - high) for k in widths]
        return [x / math.fsum(raw) for x in raw]

    # At the ends theta is infinite; there the distribution is a point in float64.
    low, high = -1000.0, 1000.0
    for _ in range(_HALVINGS):
        theta = (low + high) / 2
        below = math.fsum(p * k for p, k in zip(shares(theta), widths, strict=True)) < mean
        low, high = (theta, high) if below else (low, theta)
    return shares(high)


def draw(
    names: Sequence[str], widths: Sequence[int], mean: float, generator: torch.Generator
) -> dict[str, int]:
    """A width for each name, independently, with `width_shares`."""
    shares = torch.tensor(width_shares(mean, widths), dtype=torch.float64)
    places = torch.multinomial(shares, len(names), replacement=True, generator=generator)
    return {name: widths[place] for name, place in zip(names, places.tolist(), strict=True)}


@dataclass(frozen=True)
class Mix:
    """A width for every name.

    Attributes:
        bits: name to width.
        bytes: of all, at most the budget.
        loss: as scored.
        gain: name to the fall of the loss for a bit more, by linear regression over random mixes.
    """

    bits: dict[str, int]
    bytes: int
    loss: float
    gain: dict[str, float]


def search(
    score: Callable[[Mapping[str, int]], float],
    sizes: Mapping[str, Mapping[int, int]],
    budget: int,
    *,
    samples: int,
    finalists: int,
    seed: int,
) -> Mix:
    """Find a mix within a budget by scoring mixes of a model that was trained for all of them.

    Random mixes of all sizes say how much each weight's width matters; then mixes that fill the
    budget are drawn, weights with a larger gain per byte first as a rule, and the best is taken.

    Args:
        score: loss of a mix, lower is better.
        sizes: name to width to bytes.
        budget: bytes of all together.
        samples: random mixes.
        finalists: mixes within the budget.
        seed: of all draws.

    Raises:
        UsageError: the narrowest widths exceed the budget.
    """
    names, widths = sorted(sizes), sorted(next(iter(sizes.values())))
    check_budget(sizes, budget)
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(samples):
        place = float(torch.rand((), generator=generator, dtype=torch.float64))
        mean = widths[0] + (widths[-1] - widths[0]) * place
        bits = draw(names, widths, mean, generator)
        seen.append((bits, score(bits)))
    gain = _gains(seen, names)
    # The same width for all is among the finalists, and the mix that follows the gains alone.
    mixes = [dict.fromkeys(names, bits) for bits in widths]
    draws = [None, *[generator] * (finalists - 1)]
    mixes += [_filled(gain, sizes, widths, budget, each) for each in draws]
    found: list[tuple[float, int, dict[str, int]]] = []
    for bits in mixes:
        used = sum(sizes[name][k] for name, k in bits.items())
        if used <= budget and all(bits != other for _, _, other in found):
            found.append((score(bits), used, bits))
    loss, used, bits = min(found, key=lambda mix: mix[0])
    return Mix(bits, used, loss, gain)


def check_budget(sizes: Mapping[str, Mapping[int, int]], budget: int) -> None:
    """Refuse a budget of bytes that the narrowest widths exceed.

    Raises:
        UsageError: it is one.
    """
    least = sum(min(own.values()) for own in sizes.values())
    if least > budget:
        raise UsageError(
            f"budget of {budget} bytes: the narrowest widths take {least}; raise it, or add a width"
        )


def _gains(
    seen: Sequence[tuple[Mapping[str, int], float]], names: Sequence[str]
) -> dict[str, float]:
    """Fall of the loss per bit of each name, by least squares with a small ridge."""
    x_NI = torch.tensor([[float(bits[name]) for name in names] for bits, _ in seen]).double()
    y_N = torch.tensor([loss for _, loss in seen], dtype=torch.float64)
    x_NI, y_N = x_NI - x_NI.mean(0), y_N - y_N.mean()
    ridge = torch.eye(len(names), dtype=torch.float64) * max(1e-9, float(x_NI.square().mean()))
    slope_I = torch.linalg.solve(x_NI.T @ x_NI + ridge, x_NI.T @ y_N)
    return dict(zip(names, (-slope_I).tolist(), strict=True))


def _filled(
    gain: Mapping[str, float],
    sizes: Mapping[str, Mapping[int, int]],
    widths: Sequence[int],
    budget: int,
    generator: torch.Generator | None,
) -> dict[str, int]:
    """A mix that fills the budget: upgrades by gain per byte, shuffled a little by a generator."""
    bits = dict.fromkeys(sizes, widths[0])
    left = budget - sum(own[widths[0]] for own in sizes.values())
    steps = []
    for name, own in sizes.items():
        for low, high in pairwise(widths):
            cost = own[high] - own[low]
            # The loss falls about fourfold a bit: so does what the next bit gains.
            worth = max(gain[name], 0.0) * 4.0 ** (widths[0] - low) * (high - low) / cost
            if generator is not None:
                noise = torch.rand((), generator=generator, dtype=torch.float64)
                worth *= math.exp(2 * float(noise) - 1)
            steps.append((worth, name, low, high, cost))
    steps.sort(key=lambda step: (-step[0], step[1]))
    for _, name, low, high, cost in steps * 2:
        if bits[name] == low and cost <= left:
            bits[name], left = high, left - cost
    return bits
