"""In which order the planes of a layer's experts are read while what has arrived is computed.

Reading and computing are the two machines of a flow shop; the planes of one expert are a chain, for
a plane is of use only with those below it. Shortest total time: Johnson's rule on chains. D2MoE's
rule, hottest expert bit first (section 5), needs no times and is nearly as good.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fissile.errors import UsageError

Order = Literal["hottest", "johnson", "index"]
Item: TypeAlias = tuple[int, int, int, int]
"""(expert, plane, bytes, tokens that use the plane: at its width or a higher one)."""
Chain: TypeAlias = Sequence[tuple[float, float]]
"""(seconds to read, seconds to compute) of the planes of one expert, in ascending order."""


@dataclass(frozen=True)
class Rates:
    """What reading and computing cost, for Johnson's rule; only their ratios matter.

    Args:
        byte: seconds to read one.
        expert: seconds to decode one.
        token: seconds to compute one token with one expert.
    """

    byte: float = 1e-9
    expert: float = 1e-4
    token: float = 1e-5


def read_order(
    order: Order, items: Sequence[Item], rates: Rates = Rates()
) -> list[tuple[int, int]]:
    """Order the planes of one layer.

    Args:
        order: "hottest": `hottest_first`; "johnson": `johnson`, where an expert is computed when
            its last plane has arrived; "index": as they come.
        items: of one expert with ascending planes, one after the other.
        rates: for "johnson"; None for those of a CPU.

    Returns:
        (expert, plane), each expert's planes ascending.

    Raises:
        UsageError: no such order.
    """
    if order == "index":
        return [(expert, plane) for expert, plane, _, _ in items]
    if order == "hottest":
        return hottest_first(items)
    if order != "johnson":
        raise UsageError(f"order {order!r}: accepted are hottest, johnson, index")
    rates = rates or Rates()
    chains: dict[int, list[Item]] = {}
    for item in items:
        chains.setdefault(item[0], []).append(item)
    costs = [
        [
            (
                rates.byte * nbytes,
                rates.expert + rates.token * tokens if item is chain[-1] else 0.0,
            )
            for item in chain
            for nbytes, tokens in [item[2:]]
        ]
        for chain in chains.values()
    ]
    lists = list(chains.values())
    return [(lists[c][i][0], lists[c][i][1]) for c, i in johnson(costs)]


def hottest_first(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Hottest expert bit first: of every expert's next plane, the one that most tokens use.

    Args:
        items: of one expert with ascending planes. With cumulative counts (tokens at this width or
            a higher one) a plane is as hot as all that will be computed with it.

    Returns:
        (expert, plane); ties go to the lower index, planes of one expert together.
    """
    queues: dict[int, list[Item]] = {}
    for item in reversed(items):
        queues.setdefault(item[0], []).append(item)
    heap = [(-queue[-1][3], expert) for expert, queue in queues.items()]
    heapq.heapify(heap)
    found = []
    while heap:
        _, expert = heapq.heappop(heap)
        found.append((expert, queues[expert].pop()[1]))
        if queues[expert]:
            heapq.heappush(heap, (-queues[expert][-1][3], expert))
    return found


def johnson(chains: Sequence[Chain]) -> list[tuple[int, int]]:
    """Order of least makespan: Johnson's rule for a two-machine flow shop, on chains.

    Neighbours of a chain that the rule would exchange are merged,
    (a, b) + (a', b') = (a + max(0, a' - b), b' + max(0, b - a')), until each chain agrees with it.

    Args:
        chains: times of each chain's items, in the order that must be kept.

    Returns:
        (chain, index in it) of every item.
    """
    blocks: list[tuple[tuple[int, float], int, list[int]]] = []
    for number, chain in enumerate(chains):
        own: list[tuple[float, float, list[int]]] = []
        for index, (io, compute) in enumerate(chain):
            own.append((io, compute, [index]))
            while len(own) > 1 and _rank(*own[-1][:2]) < _rank(*own[-2][:2]):
                (a, b, first), (c, d, second) = own[-2:]
                own[-2:] = [(a + max(0.0, c - b), d + max(0.0, b - c), first + second)]
        blocks += [(_rank(io, compute), number, items) for io, compute, items in own]
    blocks.sort(key=lambda block: block[0])  # stable: equal blocks of a chain keep their order
    return [(number, index) for _, number, items in blocks for index in items]


def _rank(io: float, compute: float) -> tuple[int, float]:
    return (0, io) if io < compute else (1, -compute)


def makespan(chains: Sequence[Chain], order: Sequence[tuple[int, int]]) -> float:
    """Time until everything is computed when items are read, and then computed, in this order."""
    read = done = 0.0
    for chain, index in order:
        io, compute = chains[chain][index]
        read += io
        done = max(done, read) + compute
    return done
