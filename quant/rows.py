"""Splitting independent output rows into pieces that bound memory.

Nothing here changes a result: rows of a weight never see each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

# Elementwise passes on a CPU run at cache speed when a piece fits; a GPU wants large pieces.
_CACHE_VALUES = 1 << 19
_GPU_VALUES = 1 << 26


def row_chunks(rows: int, values_per_row: int, device: torch.device) -> Iterator[slice]:
    """Slices over `rows`, each of at most about the values a device handles well at once.

    Args:
        rows: how many there are.
        values_per_row: floats that one row keeps alive in the caller's inner step.
        device: where they lie.
    """
    limit = _CACHE_VALUES if device.type == "cpu" else _GPU_VALUES
    yield from slices(rows, max(16, limit // max(values_per_row, 1)))


def slices(total: int, size: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most `size`, that cover `total`."""
    pieces = max(1, -(-total // size))
    bounds = [total * i // pieces for i in range(pieces + 1)]
    for begin, end in pairwise(bounds):
        yield slice(begin, end)
