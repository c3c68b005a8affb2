"""Windows of a residual stream that lie in a file, so that many streams cost no memory.

Shapes: N windows, S tokens per window, D model width; B windows of one access.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Windows:
    """A float32 tensor (N, S, D), in memory or in a file, read and written by windows.

    The file has no name: it is gone with the process, however that ends.

    Args:
        shape: (N, S, D).
        folder: where the file lies; None keeps the windows in memory.
    """

    def __init__(self, shape: tuple[int, int, int], folder: Path | None = None) -> None:
        self.shape = shape
        self._held = torch.empty(shape) if folder is None else None
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._bytes = 4 * shape[1] * shape[2]

    @classmethod
    def of(cls, x_NSD: Tensor, folder: Path | None = None) -> Windows:
        """The same windows, copied."""
        made = cls((x_NSD.shape[0], x_NSD.shape[1], x_NSD.shape[2]), folder)
        made[slice(0, len(x_NSD))] = x_NSD
        return made

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, windows: slice | Tensor) -> Tensor:
        """Windows (B, S, D) of a slice with both ends, or of int64 indices."""
        if self._held is not None:
            return self._held[windows]
        chosen = self._chosen(windows)
        found = torch.empty(len(chosen), *self.shape[1:])
        view, at = _bytes_of(found), 0
        for first, count in _runs(chosen):
            shift, end = first * self._bytes - at, at + count * self._bytes
            while at < end:
                read = os.preadv(self._fd, [view[at:end]], shift + at)
                if not read:
                    raise OSError(f"the file of {len(self)} windows ends early")
                at += read
        return found

    def __setitem__(self, windows: slice, x_BSD: Tensor) -> None:
        """Replace the windows of a slice with both ends."""
        if self._held is not None:
            self._held[windows] = x_BSD
            return
        view = _bytes_of(x_BSD.detach().float().contiguous())
        at, begin = 0, windows.start * self._bytes
        while at < len(view):
            at += os.pwrite(self._fd, view[at:], begin + at)

    @property
    def _fd(self) -> int:
        assert self._file is not None
        return self._file.fileno()

    def _chosen(self, windows: slice | Tensor) -> list[int]:
        if isinstance(windows, slice):
            return list(range(windows.start, min(windows.stop, len(self))))
        return [int(w) for w in windows]


def _bytes_of(x: Tensor) -> memoryview:
    array: Any = x.numpy()
    return memoryview(array).cast("B")


def _runs(chosen: list[int]) -> Iterator[tuple[int, int]]:
    """First and count of every run of consecutive numbers."""
    breaks = [i for i in range(1, len(chosen)) if chosen[i] != chosen[i - 1] + 1]
    for begin, end in pairwise([0, *breaks, len(chosen)]):
        if end > begin:
            yield chosen[begin], end - begin
