"""Which tokens share a pass, and which layers they run: schedulers behind one interface.

Selections of requests are those of `batching`; layered prefill (arXiv 2510.08055) and ExpertFlow's
token scheduler (arXiv 2410.17954) remember what they have begun.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Protocol

from fissile.errors import UsageError
from fissile.registry import suggest
from fissile.serve.batching import SCHEDULERS as SELECTIONS
from fissile.serve.batching import Limits, Scheduler, Unit

LAYERED_TOKENS = 512
"""Prompt tokens for which layered prefill makes one group of layers."""
_COHORT = 8192


@dataclass
class Active:
    """A request that has arrived and is not finished.

    Args:
        request: its number.
        arrival: seconds.
        prompt: tokens of its prompt.
        rows: tokens that run through the model.
        done: of those, how many have.
        ready: seconds since which it waits for a pass.
        ready_pass: number of the pass before which it became ready.
    """

    request: int
    arrival: float
    prompt: int
    rows: int
    done: int = 0
    ready: float = 0.0
    ready_pass: int = 0

    @property
    def decoding(self) -> bool:
        """Whether its prompt is done."""
        return self.done >= self.prompt


@dataclass(frozen=True)
class Piece:
    """Rows of one request that run in a pass, through some layers.

    Args:
        request: its number.
        begin: first row, counted within the request.
        end: after the last row.
        first_layer: they run from here
        last_layer: to before here; the pass that runs the last layer finishes the rows.
    """

    request: int
    begin: int
    end: int
    first_layer: int
    last_layer: int


@dataclass(frozen=True)
class View:
    """What a scheduler may look at.

    Args:
        passes: passes run so far.
        active: requests in the order of their arrival.
        limits: of a pass; `wait` counts passes.
        layers: of the model.
        experts_of: set of the experts, one bit each, that a request's rows [begin, end) are known
            or guessed to need.
        resident: set of the experts in memory.
    """

    passes: int
    active: Sequence[Active]
    limits: Limits
    layers: int
    experts_of: Callable[[Active, int, int], int]
    resident: Callable[[], int]


class PassScheduler(Protocol):
    """One interface for all."""

    def plan(self, view: View) -> list[Piece]:
        """The pieces of the next pass, at least one."""
        ...


def _unit(view: View, item: Active, *, known: bool = True) -> Unit:
    end = item.done + 1 if item.decoding else item.prompt
    cut = min(end, item.done + view.limits.tokens)
    return Unit(
        ident=item.request,
        experts=view.experts_of(item, item.done, cut) if known else 0,
        tokens=cut - item.done,
        waited=view.passes - item.ready_pass,
        prefill=not item.decoding,
        arrival=item.arrival,
    )


@dataclass(frozen=True)
class Selecting:
    """A selection of `batching`, all layers for every token.

    Args:
        select: from ready units to a pass.
        known: whether it looks at the experts; finding them costs time.
    """

    select: Scheduler
    known: bool

    def plan(self, view: View) -> list[Piece]:
        """The pieces of the next pass."""
        units = [_unit(view, item, known=self.known) for item in view.active]
        resident = view.resident() if self.known else 0
        active = {item.request: item for item in view.active}
        chosen = self.select(units, view.limits, resident)
        return [_piece(view, active[request], tokens) for request, tokens in chosen]


@dataclass
class Layered:
    """Layered prefill: a prompt passes group after group of layers, one group a pass.

    Tokens to decode run all layers in every pass. One cohort of prompts is under way at a time; it
    is cut into ceil(tokens / 512) groups of layers, so that a pass carries the work of about 512
    prompt tokens, and no expert of a layer is read twice for one prompt.

    Args:
        tokens: prompt tokens per group.
    """

    tokens: int = LAYERED_TOKENS
    _cohort: list[tuple[int, int, int]] = field(default_factory=list)
    _groups: list[tuple[int, int]] = field(default_factory=list)

    def plan(self, view: View) -> list[Piece]:
        """The pieces of the next pass."""
        decoding = sorted((a for a in view.active if a.decoding), key=lambda a: a.ready_pass)
        room = view.limits.requests
        pieces = [_piece(view, item, 1) for item in decoding[: min(view.limits.tokens, room)]]
        if not self._groups:
            self._admit(view, room - len(pieces))
        if self._groups:
            first, last = self._groups.pop(0)
            pieces += [Piece(r, begin, end, first, last) for r, begin, end in self._cohort]
        return pieces

    def _admit(self, view: View, room: int) -> None:
        self._cohort = []
        total = 0
        for item in view.active:
            if item.decoding:
                continue
            tokens = min(item.prompt - item.done, _COHORT)
            if len(self._cohort) >= room or (self._cohort and total + tokens > _COHORT):
                break
            self._cohort.append((item.request, item.done, item.done + tokens))
            total += tokens
        if self._cohort:
            count = min(view.layers, max(1, ceil(total / self.tokens)))
            size, more = divmod(view.layers, count)
            ends = [(i + 1) * size + min(i + 1, more) for i in range(count)]
            self._groups = list(zip([0, *ends], ends, strict=False))


@dataclass
class TokenScheduler:
    """ExpertFlow's: tokens of two passes are split anew so that each half shares its experts.

    Prompts run first, cut as for FCFS, until the requests of two passes decode. Those that became
    ready first are then clustered into equal halves of small Hamming distance, which run one after
    the other; in the order they came where that needs no more experts.
    """

    _second: list[int] = field(default_factory=list)

    def plan(self, view: View) -> list[Piece]:
        """The pieces of the next pass."""
        active = {item.request: item for item in view.active}
        size = min(view.limits.tokens, view.limits.requests)
        first, self._second = [r for r in self._second if active[r].decoding], []
        if not first:
            decoding = [item for item in view.active if item.decoding]
            prompts = [item for item in view.active if not item.decoding]
            if prompts and len(decoding) < 2 * size:
                units = [_unit(view, item, known=False) for item in prompts]
                chosen = SELECTIONS["fcfs"](units, view.limits, 0)
                return [_piece(view, active[r], tokens) for r, tokens in chosen]
            both = sorted(decoding, key=lambda a: a.ready_pass)[: 2 * size]
            first = [item.request for item in both]
            if len(both) > size:
                masks = [view.experts_of(a, a.done, a.done + 1) for a in both]
                halves = split_in_two(masks, size)
                first, self._second = ([both[i].request for i in half] for half in halves)
        return [_piece(view, active[r], 1) for r in first]


def _piece(view: View, item: Active, tokens: int) -> Piece:
    return Piece(item.request, item.done, item.done + tokens, 0, view.layers)


def split_in_two(masks: Sequence[int], size: int, rounds: int = 8) -> tuple[list[int], list[int]]:
    """Indices of two parts, the first of `size`, with few different experts (ExpertFlow, TS).

    Two clusters grow around medoids by Hamming distance with balanced sizes; the split in the given
    order is the answer where no clustering needs fewer.

    Args:
        masks: set of the experts of each token, one bit each; more than `size` of them.
        size: of the first part.
        rounds: clusterings at most.
    """
    indices = list(range(len(masks)))
    best = (indices[:size], indices[size:])
    least = _union_size(masks, best)
    far = max(indices, key=lambda i: (masks[i] ^ masks[0]).bit_count())
    centres = (masks[max(indices, key=lambda i: (masks[i] ^ masks[far]).bit_count())], masks[far])
    for _ in range(rounds):
        nearer = sorted(
            indices,
            key=lambda i: (masks[i] ^ centres[0]).bit_count() - (masks[i] ^ centres[1]).bit_count(),
        )
        parts = (nearer[:size], nearer[size:])
        if (found := _union_size(masks, parts)) < least:
            best, least = parts, found
        new = (_medoid(masks, parts[0]), _medoid(masks, parts[1]))
        if new == centres:
            break
        centres = new
    return best


def _union_size(masks: Sequence[int], parts: tuple[list[int], list[int]]) -> int:
    total = 0
    for part in parts:
        union = 0
        for i in part:
            union |= masks[i]
        total += union.bit_count()
    return total


def _medoid(masks: Sequence[int], part: Sequence[int]) -> int:
    return min(
        (masks[i] for i in part), key=lambda m: sum((m ^ masks[j]).bit_count() for j in part)
    )


PASS_SCHEDULERS: tuple[str, ...] = (*SELECTIONS, "layered", "expertflow")
"""Names of all schedulers."""


def make_pass_scheduler(name: str) -> PassScheduler:
    """A new scheduler.

    Args:
        name: one of `PASS_SCHEDULERS`.

    Raises:
        UsageError: there is none of that name.
    """
    if name == "layered":
        return Layered()
    if name == "expertflow":
        return TokenScheduler()
    if name not in SELECTIONS:
        hint = suggest(name, list(PASS_SCHEDULERS))
        raise UsageError(f"scheduler {name!r} is not one of {', '.join(PASS_SCHEDULERS)}{hint}")
    return Selecting(SELECTIONS[name], known=name == "expert-aware")
