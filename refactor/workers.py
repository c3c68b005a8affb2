"""Several processes that train one model together; a single process knows nothing of them.

Started by `accelerate launch`, every process runs the same program. Gradients are averaged after
each step, so all keep the same weights; only the main process writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

_BUCKET = 1 << 24
"""Numbers averaged at once: bounds the copy that an exchange needs."""


class Workers:
    """This process among the ones that train together.

    Attributes:
        rank: number of this process; 0 is the main one.
        count: processes in all.
        device: where this process computes.
    """

    def __init__(self, state: Any | None = None) -> None:
        self._state = state
        self.rank: int = state.process_index if state else 0
        self.count: int = state.num_processes if state else 1
        alone = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device: torch.device = state.device if state else alone

    @classmethod
    def alone(cls, device: torch.device) -> Workers:
        """One process, on a device."""
        single = cls()
        single.device = device
        return single

    @property
    def main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come this far."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process pass the block before the others enter it."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in place."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        bucket: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            if i + 1 < len(tensors) and sum(t.numel() for t in bucket) < _BUCKET:
                continue
            flat = reduce(torch.cat([t.flatten().float() for t in bucket]), reduction="mean")
            sizes = [t.numel() for t in bucket]
            for old, new in zip(bucket, flat.split(sizes), strict=True):
                old.copy_(new.view_as(old))
            bucket = []

    def from_main(self, value: float) -> float:
        """The main process's value of a number."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast

        # Clocks and counters need all their digits.
        return float(broadcast(torch.tensor([value], dtype=torch.float64, device=self.device))[0])


def join_workers() -> Workers:
    """Join the processes of `accelerate launch`; alone, nothing is set up.

    The wait for the main process has no end: its other stages may take hours.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Workers()
    from accelerate import PartialState

    cuda = torch.cuda.is_available()
    return Workers(PartialState(cpu=not cuda, timeout=timedelta(days=30)))
