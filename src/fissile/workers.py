"""Several processes that work on one model together; a single process knows nothing of them.

Started by `torchrun` or `accelerate launch`, every process runs the same program on the same files.
Windows, rows and experts are shared out, and sums come back to all in one order, so all processes
keep the same weights; only the main one writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from fissile.errors import FissileError, LostProcess, Told

_BUCKET = 1 << 24
"""Numbers exchanged at once: bounds the copy that this needs."""
_PATIENCE = timedelta(days=30)
"""Wait for the main process: its other stages may take hours."""


class Workers:
    """This process among the ones that work together.

    Attributes:
        rank: number of this process; 0 is the main one.
        count: processes in all.
        device: where this process trains.
    """

    def __init__(self, state: Any | None = None) -> None:
        self.rank: int = state.process_index if state else 0
        self.count: int = state.num_processes if state else 1
        alone = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.device: torch.device = state.device if state else alone
        # What lies in main memory is exchanged there, whatever connects the devices.
        self._near: Any = None
        if self.count > 1 and dist.get_backend() != "gloo":
            self._near = dist.new_group(backend="gloo", timeout=_PATIENCE)

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
        if self.count > 1:
            with _exchange():
                dist.barrier(group=self._near)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process pass the block before the others enter it."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    # -- shares ----------------------------------------------------------------------------------

    def share(self, total: int, rank: int | None = None) -> slice:
        """A process's part of so many things: contiguous, of nearly equal length.

        Args:
            total: how many there are.
            rank: of the process; this one without it.
        """
        rank = self.rank if rank is None else rank
        return slice(total * rank // self.count, total * (rank + 1) // self.count)

    def gather(self, part: Tensor, dim: int, total: int) -> Tensor:
        """All processes' parts joined along a dimension.

        Args:
            part: this process's `share(total)` of them, in main memory.
            dim: of the parts.
            total: length of the whole there.
        """
        if self.count == 1:
            return part
        parts = []
        for rank in range(self.count):
            own, shape = self.share(total, rank), list(part.shape)
            shape[dim] = own.stop - own.start
            piece = part.contiguous() if rank == self.rank else part.new_empty(shape)
            parts.append(self.from_rank(piece, rank))
        return torch.cat(parts, dim)

    def from_rank(self, tensor: Tensor, rank: int) -> Tensor:
        """A process's contiguous tensor in main memory, which those of the others become."""
        if self.count > 1 and tensor.numel():
            with _exchange():
                dist.broadcast(tensor, rank, group=self._near)
        return tensor

    # -- sums ------------------------------------------------------------------------------------

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one device by their sums over the processes, in place."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            # A stack of Hessians is large: no copy of it.
            flat = bucket[0].view(-1) if alone else torch.cat([x.flatten() for x in bucket])
            with _exchange():
                dist.all_reduce(flat, group=self._near if flat.device.type == "cpu" else None)
            if alone:
                continue
            sizes = [tensor.numel() for tensor in bucket]
            for old, new in zip(bucket, flat.split(sizes), strict=True):
                old.copy_(new.view_as(old))

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors of one device by their mean over the processes, in place."""
        self.sum_(tensors)
        if self.count > 1:
            for tensor in tensors:
                tensor.div_(self.count)

    def mean_of(self, own: Tensor) -> Tensor:
        """The mean of a tensor over the processes, with the gradient of this one's part."""
        mean = own.detach().clone()
        self.mean_([mean])
        return own + (mean - own.detach())

    # -- words -----------------------------------------------------------------------------------

    def from_main(self, value: float) -> float:
        """The main process's value of a number."""
        # Clocks and counters need all their digits.
        return float(self.from_rank(torch.tensor([value], dtype=torch.float64), 0)[0])

    def call(self, task: Mapping[str, Any] | None) -> None:
        """Tell the others, who wait in `called`, what comes next; None: nothing more."""
        if self.count > 1 and self.main:
            text = torch.tensor(list(json.dumps(task).encode()), dtype=torch.uint8)
            self.from_rank(torch.tensor([len(text)]), 0)
            self.from_rank(text, 0)

    def called(self) -> dict[str, Any] | None:
        """What the main process calls the others for."""
        length = int(self.from_rank(torch.zeros(1, dtype=torch.int64), 0)[0])
        text = self.from_rank(torch.empty(length, dtype=torch.uint8), 0)
        task: dict[str, Any] | None = json.loads(bytes(text.tolist()))
        return task

    def agreed(self, value: bool) -> bool:
        """The main process's answer to a question that others may see differently by now."""
        return bool(self.from_main(float(value)))

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """Of processes that fail one after the other, let the first one say why.

        Raises:
            Told: this process failed because another one had.
        """
        try:
            yield
        except BaseException as err:
            if self.count > 1 and not _first():
                raise Told("another process has failed") from err
            if not self.main and isinstance(err, FissileError):
                raise type(err)(f"process {self.rank} of {self.count}: {err}") from err
            raise


def join_workers() -> Workers:
    """Join the processes of `torchrun` or `accelerate launch`; alone, nothing is set up."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return Workers()
    from accelerate import PartialState

    return Workers(PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE))


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of parameters; zeros, in every process alike, for an expert that no token chose."""
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type that are exchanged at once: many small calls would cost more."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        total = sum(t.numel() for t in bucket)
        if bucket and (tensor.dtype != bucket[0].dtype or total + tensor.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def _exchange() -> Iterator[None]:
    """Name what a failed exchange means: a process at its other end is gone."""
    try:
        yield
    except RuntimeError as err:
        reason = str(err).partition("\n")[0].partition(". ")[0]
        raise LostProcess(f"another process of this run has ended ({reason})") from err


def _first() -> bool:
    """Whether this process is the first one of all to ask."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add("fissile/failed", 1)) == 1
    except RuntimeError:
        return True  # whoever kept the count is gone, and has not said anything
