"""Tensors of an exported model as data: which blocks of the artifact's tensors they consist of.

An export only moves numbers, apart from factors that are powers of two or belong to a norm. Said
as data, one description serves the plan (shapes and bytes, no weight read), the float weights, and
integer codes with their scales and zeros (`unit` columns of a code share one scale).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Span = tuple[int, int]
Fetch = Callable[[str], "Tensor"]


@dataclass(frozen=True)
class Piece:
    """A block of a source tensor and where it goes.

    Args:
        source: canonical name in the artifact, or a name in `Lowered.made`.
        at: row and column of the target where the block begins; only the row for vectors.
        rows: rows [begin, end) of the source that are taken; None means all.
        columns: columns [begin, end) that are taken; None means all.
        index: which matrix of a stack (E, N, K).
        factor: what the numbers are multiplied by.
    """

    source: str
    at: tuple[int, int] = (0, 0)
    rows: Span | None = None
    columns: Span | None = None
    index: int | None = None
    factor: float = 1.0


@dataclass(frozen=True)
class Target:
    """A tensor of the exported model: zero wherever no piece lies.

    Args:
        name: in the exported checkpoint.
        shape: (N, K), or (N,) for a vector.
        pieces: what it consists of; they do not overlap.
        exact: kept in float32 whatever the dtype of the export.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    exact: bool = False


@dataclass(frozen=True)
class Lowered:
    """A model of a stock class, described.

    Args:
        config: contents of its config.json, without the dtype.
        targets: all its tensors in file order.
        made: tensors that no artifact stores, by name: codes of experts, identities, ones.
        cost: what the lowering costs, in the order in which it is shown.
    """

    config: dict[str, Any]
    targets: tuple[Target, ...]
    made: Mapping[str, Callable[[], Tensor]]
    cost: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Numbers that the exported model stores."""
        return sum(prod(target.shape) for target in self.targets)


def materialise(target: Target, fetch: Fetch, *, unit: int = 1, scaled: bool = True) -> Tensor:
    """Put a target together.

    Args:
        target: what to build.
        fetch: source name to its tensor; stacks (E, N, K) whole.
        unit: columns of the weight that one column of the fetched tensors stands for.
        scaled: whether factors apply; they do not to integer codes.

    Returns:
        The tensor (N, K / unit) in the dtype of the first piece's source, float32 without pieces.
    """
    import torch

    shape = target.shape if len(target.shape) == 1 else (target.shape[0], target.shape[1] // unit)
    found: Tensor | None = None
    for piece in target.pieces:
        block = _block(piece, fetch(piece.source), unit)
        if found is None:
            found = torch.zeros(shape, dtype=block.dtype)
        if scaled and piece.factor != 1.0:
            block = block * piece.factor
        row, column = piece.at
        if block.dim() == 1:
            found[row : row + len(block)] = block
        else:
            begin = column // unit
            found[row : row + block.shape[0], begin : begin + block.shape[1]] = block
    return torch.zeros(shape) if found is None else found


def _block(piece: Piece, source: Tensor, unit: int) -> Tensor:
    if piece.index is not None:
        source = source[piece.index]
    if piece.rows is not None:
        source = source[slice(*piece.rows)]
    if piece.columns is not None:
        begin, end = piece.columns
        source = source[:, begin // unit : end // unit]
    return source


def aligned(target: Target, unit: int) -> bool:
    """Whether every piece begins and ends at a multiple of `unit` columns (its end is checked by
    the caller against the source's width)."""
    numbers = [target.shape[-1]]
    for piece in target.pieces:
        numbers += [piece.at[1], *(piece.columns or ())]
    return len(target.shape) == 2 and all(number % unit == 0 for number in numbers)


def heads_pieces(
    source: str,
    heads: int,
    kv_heads: int,
    size: int,
    host_heads: int,
    *,
    at: int = 0,
    over_columns: bool = False,
    vector: bool = False,
    factor: float = 1.0,
) -> Iterator[Piece]:
    """Query heads placed among more heads so that each still meets its own keys.

    Query head i of `heads` reads key head i // (heads / kv_heads). In the host each key head has
    host_heads / kv_heads query heads, the first of which are used; the others are zero.

    Args:
        source: q_proj, its bias, or o_proj.
        heads: query heads of the source.
        kv_heads: key heads of both.
        size: of one head.
        host_heads: query heads of the host.
        at: row (or column) of the target that the other axis begins at.
        over_columns: heads lie along the columns (o_proj).
        vector: the source is a bias.
        factor: of the numbers.
    """
    own, room = heads // kv_heads, host_heads // kv_heads
    for group in range(kv_heads):
        taken = (group * own * size, (group + 1) * own * size)
        begin = group * room * size
        if over_columns:
            yield Piece(source, at=(at, begin), columns=taken, factor=factor)
        else:
            yield Piece(source, at=(begin, 0 if vector else at), rows=taken, factor=factor)
