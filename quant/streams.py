"""What flows through the layers of a model while it is quantized.

Every width that is stored has a residual stream of its own, which has gone through the layers at
that width; the float model's stream goes beside them where targets are taken from it. Processes
that work together send a part of the windows each through a layer, and then hold all of them.

Shapes: N windows, S tokens per window, T = B*S tokens of a batch, D model width, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.routers_fissile import Route
from fissile.models.stream import StreamedModel, batches
from fissile.quant.spill import Windows
from fissile.workers import Workers


class Streams:
    """Residual streams between two layers, in place.

    Attributes:
        slices: batches of windows, in order.
        own: those of them that this process sends through layers.

    Args:
        model: float model.
        ids_NS: int64 windows without padding.
        widths: a stream for each.
        batch_tokens: tokens of a forward pass.
        floats: keep the float model's stream too.
        folder: several streams lie in files there; None keeps all in memory.
        workers: processes that share the windows.
    """

    def __init__(
        self,
        model: StreamedModel,
        ids_NS: Tensor,
        widths: tuple[int, ...],
        batch_tokens: int,
        *,
        floats: bool,
        folder: Path | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.model, self.workers = model, workers or Workers()
        shares = [self.workers.share(len(ids_NS), rank) for rank in range(self.workers.count)]
        self._of_rank = [
            [slice(part.start + p.start, part.start + p.stop) for p in found]
            for part in shares
            for found in [batches(ids_NS[part], batch_tokens)]
        ]
        self.slices = [part for parts in self._of_rank for part in parts]
        self.own = self._of_rank[self.workers.rank]
        self.shape = (len(ids_NS), ids_NS.shape[1], model.config.hidden_size)
        self.folder = folder if len(widths) + floats > 1 else None
        self.hidden = {bits: self._embedded(ids_NS) for bits in widths}
        self.float_NSD = self._embedded(ids_NS) if floats else None
        self._routes = [model.routes(ids_NS[part]) for part in self.slices]

    def empty(self) -> Windows:
        """Room for one more stream."""
        return Windows(self.shape, self.folder)

    def _embedded(self, ids_NS: Tensor) -> Windows:
        found = self.empty()
        for part in self.slices:
            found[part] = self.model.embed(ids_NS[part])
        return found

    def routes(self, layer_idx: int) -> list[Route | None]:
        """The pre-gating router's decision of every batch for one layer."""
        return [routes[layer_idx] for routes in self._routes]

    def route_of(self, layer_idx: int, windows: Tensor) -> Route | None:
        """The same for any windows (int64 indices)."""
        found = self.routes(layer_idx)
        if found[0] is None:
            return None
        count = [part.stop - part.start for part in self.slices]
        index, weights = (
            torch.cat(
                [
                    route[i].unflatten(0, (n, -1))
                    for route, n in zip(found, count, strict=True)
                    if route
                ]
            )[windows].flatten(0, 1)
            for i in (0, 1)
        )
        return index, weights

    def batches(self, bits: int | None, layer_idx: int) -> Iterator[tuple[Tensor, Route | None]]:
        """Hidden states (B, S, D) and route of this process's batches; float stream for None."""
        hidden = self.float_NSD if bits is None else self.hidden[bits]
        assert hidden is not None
        for part, route in zip(self.slices, self.routes(layer_idx), strict=True):
            if part in self.own:
                yield hidden[part], route

    def first(self, count: int, layer_idx: int) -> Iterator[tuple[Tensor, Route | None]]:
        """The same of the float stream, of this process's part of the first windows."""
        assert self.float_NSD is not None
        most = max(part.stop - part.start for part in self.slices)
        mine = torch.arange(count)[self.workers.share(count)]
        for windows in mine.split(most) if len(mine) else ():
            yield self.float_NSD[windows], self.route_of(layer_idx, windows)

    def context(self, hidden_BSD: Tensor) -> dict[str, Any]:
        """Masks and rotary embeddings of a batch."""
        return self.model.context(hidden_BSD)

    @torch.no_grad()
    def advance(self, layer: FissileDecoderLayer, bits: int | None, layer_idx: int) -> None:
        """Replace a stream by what the layer makes of it."""
        hidden = self.float_NSD if bits is None else self.hidden[bits]
        assert hidden is not None
        for part, (x, route) in zip(self.own, self.batches(bits, layer_idx), strict=True):
            hidden[part] = layer(x, route, self.context(x))
        self.exchange(hidden)

    def exchange(self, hidden_NSD: Windows) -> None:
        """Give every process the windows that each has computed."""
        if self.workers.count == 1:
            return
        for rank, parts in enumerate(self._of_rank):
            for part in parts:
                if rank == self.workers.rank:
                    self.workers.from_rank(hidden_NSD[part].contiguous(), rank)
                else:
                    room_BSD = torch.empty(part.stop - part.start, *self.shape[1:])
                    hidden_NSD[part] = self.workers.from_rank(room_BSD, rank)
