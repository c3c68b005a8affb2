"""Where the experts of a layer are computed: on the fast device, on both, or at fewer planes.

Times are seconds since the layer's experts are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fissile.errors import UsageError
from fissile.registry import suggest
from fissile.serve.hardware import Hardware

ExecutorName = Literal["gpu", "hybrid", "mixed"]
EXECUTORS: tuple[str, ...] = get_args(ExecutorName)
LOW_WEIGHT = 0.8
"""Weight, in units of an even share among a token's experts, below which "mixed" serves an expert
at the planes that are there: what weighs little may be coarse (HOBBIT)."""


@dataclass(frozen=True)
class Work:
    """One expert of a layer.

    Args:
        expert: its number.
        tokens: that chose it.
        ready: when it is in fast memory, 0 if it is; None if it has to be brought.
    """

    expert: int
    tokens: int
    ready: float | None


@dataclass(frozen=True)
class Costs:
    """What each operation on an expert of this size takes.

    Args:
        hardware: of the machine.
        flops: of one expert for one token.
        bytes_: of one expert.
    """

    hardware: Hardware
    flops: float
    bytes_: float

    def gpu(self, tokens: int) -> float:
        """Seconds on the fast device."""
        return self.hardware.expert(self.flops, self.bytes_, tokens)

    def cpu(self, tokens: int) -> float:
        """Seconds beside the link, after the first."""
        return self.hardware.on_cpu(self.flops, self.bytes_, tokens)

    def move(self) -> float:
        """Seconds over the link."""
        return self.hardware.transfer(self.bytes_)


@dataclass(frozen=True)
class Split:
    """Who computes what.

    Args:
        gpu: experts on the fast device in the order of their start.
        cpu: experts beside the link, in order.
        moved: those of `gpu` that are brought, in order.
        end: when all are done.
    """

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    moved: tuple[int, ...]
    end: float


def split_work(work: Sequence[Work], costs: Costs, link_free: float = 0.0) -> Split:
    """HybriMoE's division of a layer between both devices (section IV-B), and never a worse one.

    Three time lines advance, each step the one whose next operation ends first: the fast device
    computes what is there, most tokens first; the link brings what is not, most tokens first; the
    CPU takes what is not there, fewest tokens first, and when none is left what is there. All on
    one device is the answer where the rule does worse, which greedy choices can.

    Args:
        work: of the layer.
        costs: of its operations.
        link_free: when the link has done what it is at.
    """
    found = [_greedy(work, costs, link_free), gpu_only(work, costs, link_free)]
    found.append(evaluate((), [w.expert for w in _by_tokens(work)], work, costs, link_free))
    return min(found, key=lambda split: split.end)


def gpu_only(work: Sequence[Work], costs: Costs, link_free: float = 0.0) -> Split:
    """Everything on the fast device; what is missing is brought, most tokens first."""
    return evaluate([w.expert for w in _by_tokens(work)], (), work, costs, link_free)


def evaluate(
    gpu: Sequence[int],
    cpu: Sequence[int],
    work: Sequence[Work],
    costs: Costs,
    link_free: float = 0.0,
) -> Split:
    """Time of a given division: the link brings in the order of `gpu`, which starts what is there.

    Args:
        gpu: experts on the fast device.
        cpu: the others.
        work: of the layer.
        costs: of its operations.
        link_free: when the link is free.
    """
    of = {w.expert: w for w in work}
    link, there, moved = link_free, {}, []
    for expert in gpu:
        ready = of[expert].ready
        if ready is None:
            link += costs.move()
            ready = link
            moved.append(expert)
        there[expert] = ready
    order = sorted(gpu, key=lambda e: (there[e], -of[e].tokens))
    end = 0.0
    for expert in order:
        end = max(end, there[expert]) + costs.gpu(of[expert].tokens)
    slow = costs.hardware.cpu_start if cpu else 0.0
    slow += sum(costs.cpu(of[expert].tokens) for expert in cpu)
    return Split(tuple(order), tuple(cpu), tuple(moved), max(end, slow))


def _by_tokens(work: Sequence[Work]) -> list[Work]:
    return sorted(work, key=lambda w: (-w.tokens, w.expert))


def _greedy(work: Sequence[Work], costs: Costs, link_free: float) -> Split:
    there = [(w.ready, w) for w in _by_tokens(work) if w.ready is not None]
    absent = [w for w in _by_tokens(work) if w.ready is None]
    gpu_t, cpu_t, link_t = 0.0, costs.hardware.cpu_start, link_free
    gpu: list[int] = []
    cpu: list[int] = []
    moved: list[int] = []
    while there or absent:
        options = []
        if there:
            ready, head = min(there, key=lambda item: (max(gpu_t, item[0]), -item[1].tokens))
            options.append((max(gpu_t, ready) + costs.gpu(head.tokens), 0))
        # What is under way already is nobody else's.
        idle = absent or [w for at, w in there if w.ready is not None and at <= cpu_t]
        if idle:
            options.append((cpu_t + costs.cpu(idle[-1].tokens), 1))
        if absent:
            options.append((link_t + costs.move(), 2))
        end, which = min(options)
        if which == 0:
            gpu_t = end
            gpu.append(head.expert)
            there.remove((ready, head))
        elif which == 1:
            cpu_t = end
            item = idle[-1]
            cpu.append(item.expert)
            absent = [w for w in absent if w is not item]
            there = [pair for pair in there if pair[1] is not item]
        else:
            link_t = end
            item = absent.pop(0)
            moved.append(item.expert)
            there.append((end, item))
    return Split(tuple(gpu), tuple(cpu), tuple(moved), max(gpu_t, cpu_t if cpu else 0.0))


def check_executor(name: str) -> str:
    """The name itself.

    Raises:
        UsageError: there is no executor of that name.
    """
    if name not in EXECUTORS:
        hint = suggest(name, list(EXECUTORS))
        raise UsageError(f"executor {name!r} is not one of {', '.join(EXECUTORS)}{hint}")
    return name
