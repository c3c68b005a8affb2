"""The part of a nested weight that one of several processes holds, and how it is read from disk.

Shapes: E experts, N output rows, K inputs, G groups along the inputs; "..." any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fissile.io.reader import TensorReader
from fissile.models.nested_fissile import NestedTensor

Cut = Literal["whole", "rows", "halves", "inputs"]
"""Which dimension is shared out: none, N, N of gates and ups apart, or K."""


@dataclass(frozen=True)
class Ranks:
    """A process's place among those that share a model's weights."""

    rank: int = 0
    size: int = 1

    def span(self, count: int, what: str) -> tuple[int, int]:
        """First index and number of this process's share of `count`.

        Raises:
            ValueError: the number of processes does not divide `count`.
        """
        if count % self.size:
            raise ValueError(f"{what}: {count} cannot be shared by {self.size} processes")
        return self.rank * (count // self.size), count // self.size


class Shard(NestedTensor):
    """A nested weight of which this process holds its share; filled by `read`.

    Where processes share out the inputs of a row, a group of weights may lie on two of them; then
    the groups become smaller and both repeat the floats.

    Args:
        whole: the weight as the model has it.
        name: in the checkpoint.
        cut: what is shared out.
        ranks: this process's place.
        experts: those of the stored stack that `whole` is; None for all.

    Raises:
        ValueError: the weight cannot be shared out evenly.
    """

    def __init__(
        self,
        whole: NestedTensor,
        name: str,
        cut: Cut,
        ranks: Ranks,
        experts: list[int] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.experts = experts
        self.name, self.cut, self.ranks, self.stored_shape = name, cut, ranks, whole.shape
        self.bits, self.companding = whole.bits, whole.companding
        self.segments, self.held = whole.segments, None
        *lead, rows, inputs = whole.shape
        if cut == "inputs":
            inputs = ranks.span(inputs, name)[1]
            if inputs % 8:
                raise ValueError(f"{name}: {inputs} inputs per process are not a multiple of 8")
        elif cut != "whole":
            rows = ranks.span(rows, name)[1]
        self.shape = (*lead, rows, inputs)
        self.stored_group, self.group_size = whole.group_size, math.gcd(whole.group_size, inputs)
        self.register_segments()

    def read(self, reader: TensorReader, device: torch.device) -> None:
        """Read the planes and floats of the served width, and no others.

        Args:
            reader: of the checkpoint.
            device: where the weight is to be.
        """
        parts = {name: self._read(reader, name).to(device) for name in self.segments}
        with torch.inference_mode(False):
            self.keep(parts)
            self.columns()

    def _read(self, reader: TensorReader, segment: str) -> Tensor:
        full = f"{self.name}.{segment}"
        if self.cut == "rows" and len(self.stored_shape) == 2:
            begin, count = self.ranks.span(self.stored_shape[0], self.name)
            return reader.load_rows(full, begin, begin + count)
        if self.experts is None:
            return self.share(reader.load(full), segment)
        own = [reader.load_rows(full, e, e + 1) for e in self.experts]
        return self.share(torch.cat(own), segment)

    def share(self, part: Tensor, segment: str) -> Tensor:
        """This process's share of a stored part.

        Args:
            part: plane (..., N, bytes), theta (..., N, G, 2) or tied (..., N, 3).
            segment: its name.
        """
        if self.cut == "whole" or self.ranks.size == 1:
            return part
        theta = segment.startswith("theta")
        row_axis = part.ndim - (3 if theta else 2)
        if self.cut == "inputs":
            if segment.startswith("tied"):
                return part  # of whole rows
            begin, _ = self.ranks.span(self.stored_shape[-1], self.name)
            if not theta:
                lanes = self.stored_shape[-1] // part.shape[-1]
                return part.narrow(-1, begin // lanes, self.shape[-1] // lanes).contiguous()
            own = torch.arange(begin, begin + self.shape[-1], self.group_size)
            return part.index_select(-2, own // self.stored_group)
        pieces = part.chunk(2 if self.cut == "halves" else 1, dim=row_axis)
        spans = [self.ranks.span(piece.shape[row_axis], self.name) for piece in pieces]
        shares = [p.narrow(row_axis, *span) for p, span in zip(pieces, spans, strict=True)]
        return torch.cat(shares, dim=row_axis)
