"""Requests under way, and what a pass of them needs.

Shapes: N tokens of one request, K slots per token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fissile.models.routers_fissile import Route
from fissile.serve.batching import Unit
from fissile.serve.store import Needs

Routes: TypeAlias = list[Route | None]
"""One route per layer, the same object where layers share it; None where a layer decides."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Args:
        ident: unique among the requests of an engine.
        prompt: token ids, at least one.
        limit: most tokens to generate, at least 1.
        stop: token ids that end it; they are not part of the answer.
        arrival: pass before which it is not there.
    """

    ident: int
    prompt: tuple[int, ...]
    limit: int
    stop: frozenset[int] = frozenset()
    arrival: int = 0


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        request: ident of the request.
        token: its id; None when a stop token ended the request.
        last: whether the request is finished.
    """

    request: int
    token: int | None
    last: bool


@dataclass(frozen=True)
class Row:
    """What one request did in a pass.

    Args:
        request: its ident.
        tokens: number of its tokens.
        prefill: whether they are the prompt's.
        routes: of every layer, chosen experts int64 (N, K) and weights (N, K).
    """

    request: int
    tokens: int
    prefill: bool
    routes: Routes


@dataclass(frozen=True)
class PassRecord:
    """One forward pass.

    Args:
        number: counted from 0.
        rows: its requests.
        needs: of every layer, experts and the tokens that went to each; empty where the router sits
            inside the layers.
        tokens: of all rows.
        seconds: it took.
    """

    number: int
    rows: list[Row]
    needs: Needs
    tokens: int
    seconds: float

    @property
    def unique_experts(self) -> float:
        """Different experts that it needed, mean over the layers."""
        return sum(map(len, self.needs)) / len(self.needs) if self.needs else 0.0


@dataclass(frozen=True)
class Outlook:
    """What a request needs next, as far as it can be told.

    Args:
        request: what was asked.
        routes: of every layer for its pending tokens; None where the router sits inside the layer.
        experts: set of the experts that they need, bit layer * E + expert.
        pending: number of these tokens; 0 when the request is finished.
        generated: number of tokens generated.
        ready: pass at which they could be computed.
    """

    request: Request
    routes: Routes
    experts: int
    pending: int
    generated: int
    ready: int

    def unit(self, now: int) -> Unit:
        """What the schedulers see at pass `now`."""
        return Unit(
            self.request.ident,
            self.experts,
            self.pending,
            now - self.ready,
            prefill=not self.generated,
            arrival=self.request.arrival,
        )

    def after(self, tokens: int, ready: int, num_experts: int) -> Outlook:
        """When `tokens` of them are computed; a token not known yet chooses as the one before."""
        if tokens < self.pending:
            begin, pending, generated = tokens, self.pending - tokens, self.generated
        else:
            begin, generated = self.pending - 1, self.generated + 1
            pending = int(generated < self.request.limit)
        routes = cut(self.routes, begin)
        experts = expert_set(needs_of(routes), num_experts)
        return Outlook(self.request, routes, experts, pending, generated, ready)


@dataclass
class Running:
    """A request under way.

    Args:
        next: what it needs next; known, not guessed.
        cache: keys and values; the router's may be ahead of the layers'.
        ids: (1, N) of the pending tokens.
        longest: most passes that it waited at a time.
    """

    next: Outlook
    cache: Any
    ids: Tensor
    longest: int = 0

    def row(self, tokens: int) -> Row:
        """Its first `tokens` pending tokens as part of a pass."""
        routes = cut(self.next.routes, 0, tokens)
        return Row(self.next.request.ident, tokens, not self.next.generated, routes)


def cut(routes: Routes, begin: int, end: int | None = None) -> Routes:
    """Routes of the tokens [begin, end); layers that share a route share it still."""
    found: Routes = []
    for layer, route in enumerate(routes):
        if layer and route is routes[layer - 1]:
            found.append(found[-1])
        else:
            found.append(route and (route[0][begin:end], route[1][begin:end]))
    return found


def joined(rows: Sequence[Routes]) -> Routes:
    """One route per layer for the tokens of all rows."""
    found: Routes = []
    for layer, routes in enumerate(zip(*rows, strict=True)):
        if layer and all(row[layer] is row[layer - 1] for row in rows):
            found.append(found[-1])
            continue
        known = [route for route in routes if route is not None]
        if not known:
            found.append(None)
            continue
        index_TK, weights_TK = (torch.cat(parts) for parts in zip(*known, strict=True))
        found.append((index_TK, weights_TK))
    return found


def needs_of(routes: Routes) -> list[dict[int, int]]:
    """Of every layer, the experts that are needed and the tokens that go to each; empty where the
    layers decide themselves."""
    needs: list[dict[int, int]] = []
    for layer, route in enumerate(routes):
        if route is None:
            return []
        if layer and route is routes[layer - 1]:
            needs.append(needs[-1])
            continue
        index_NK, weights_NK = route
        chosen, tokens = torch.unique(index_NK[weights_NK != 0], return_counts=True)
        needs.append(dict(zip(chosen.tolist(), tokens.tolist(), strict=True)))
    return needs


def expert_set(needs: Needs, num_experts: int) -> int:
    """The experts of a pass as bits, layer * E + expert."""
    found = 0
    for layer, counts in enumerate(needs):
        for expert in counts:
            found |= 1 << (layer * num_experts + expert)
    return found
