"""Mixed widths: which weight gets how many bits under a budget of bytes.

Each weight (a tensor, or one expert of a stack) can be served at several widths; wider ones cost
bytes and save loss. Along the lower convex hull of its (bytes, loss) points the gain per byte falls
with every step, so taking steps by falling gain over all weights at once is the optimum of the
relaxed problem, and of the integer problem up to the last step. A prefix of one sorted list also
makes plans nested: a larger budget only adds planes to what a smaller one loads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fissile.errors import UsageError

_UNITS = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6}
_UNITS["gb"] = 10**9


@dataclass(frozen=True)
class Choice:
    """One width of one weight.

    Attributes:
        bits: the width.
        bytes: that a load at this width holds, floats included.
        loss: what serving it costs; any unit that adds up over weights.
    """

    bits: int
    bytes: int
    loss: float


@dataclass(frozen=True)
class Step:
    """An upgrade of one weight along its hull.

    Attributes:
        name: of the weight.
        to: what it becomes.
        bytes: more than before.
        gain: loss saved per byte.
    """

    name: str
    to: Choice
    bytes: int
    gain: float


@dataclass(frozen=True)
class Allocation:
    """Widths of all weights.

    Attributes:
        bits: weight to width.
        bytes: in all, at most the budget.
        loss: in all.
    """

    bits: dict[str, int]
    bytes: int
    loss: float


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Lower convex hull of the points (bytes, loss), by rising bytes and falling loss.

    Raises:
        ValueError: there is no choice.
    """
    if not choices:
        raise ValueError("a weight without choices")
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bytes, c.loss)):
        if found and (choice.bytes == found[-1].bytes or choice.loss >= found[-1].loss):
            continue
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-1], choice):
            found.pop()
        found.append(choice)
    return found


def upgrades(table: Mapping[str, Sequence[Choice]]) -> list[Step]:
    """All steps of all weights, best gain per byte first; those of a weight stay in order."""
    steps = []
    for name, choices in table.items():
        points = hull(choices)
        for low, high in pairwise(points):
            steps.append(Step(name, high, high.bytes - low.bytes, _gain(low, high)))
    # Stable: equal gains of one weight keep their order.
    return sorted(steps, key=lambda step: -step.gain)


def allocate(table: Mapping[str, Sequence[Choice]], budget: int) -> Allocation:
    """Greedy allocation under a budget; nested in it.

    Args:
        table: weight to its choices.
        budget: bytes of all weights together.

    Raises:
        UsageError: the smallest choices together exceed the budget.
    """
    taken = {name: hull(choices)[0] for name, choices in table.items()}
    used = sum(choice.bytes for choice in taken.values())
    if used > budget:
        raise UsageError(
            f"budget of {budget} bytes: the narrowest widths take {used}; raise it, or add a width"
        )
    for step in upgrades(table):
        if used + step.bytes > budget:
            break
        taken[step.name] = step.to
        used += step.bytes
    loss = sum(choice.loss for choice in taken.values())
    return Allocation({name: choice.bits for name, choice in taken.items()}, used, loss)


def budget_bytes(text: str, weights: int) -> int:
    """Bytes of a budget such as "2.6bpw" (bits per quantized weight) or "4GiB".

    Args:
        text: the budget.
        weights: how many are quantized.

    Raises:
        UsageError: it reads as neither.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
    if found and float(found[1]) > 0:
        amount, unit = float(found[1]), found[2].lower()
        if unit == "bpw":
            return int(amount * weights / 8)
        if unit in _UNITS:
            return int(amount * _UNITS[unit])
    raise UsageError(f"budget {text!r}: accepted are bits per weight (2.6bpw) or bytes (4GiB)")


def _gain(low: Choice, high: Choice) -> float:
    """Loss saved per byte."""
    return (low.loss - high.loss) / (high.bytes - low.bytes)
