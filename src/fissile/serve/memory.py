"""Memory for units, measured where it is allocated and freed rather than as it is declared.

On the CPU a unit is one buffer. On a GPU it is read into a pinned buffer of the reading thread and
copied on a stream of its own; the stream that computes waits for the copy, never the host.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fissile.io.reader import TORCH_DTYPES
from fissile.serve.reader import Segment

Read = Callable[[memoryview], int]
"""Fills a buffer from the file and returns the bytes read."""


class Meter:
    """Bytes alive: counted when a buffer is made, and again when its memory is really given back.

    Attributes:
        live: bytes now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        self.live, self.peak = 0, 0
        # Buffers may be freed by whichever thread drops the last reference, this one included.
        self._lock = threading.RLock()

    def watch(self, owner: Any, nbytes: int) -> None:
        """Count `nbytes` until `owner`, which holds them, is gone."""
        with self._lock:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
        weakref.finalize(owner, self._freed, nbytes).atexit = False

    def _freed(self, nbytes: int) -> None:
        with self._lock:
            self.live -= nbytes


@dataclass(frozen=True)
class Buffer:
    """The bytes of one unit, uint8 (N,), on the device that computes."""

    data: Tensor
    ready: Any = None

    def views(self, segments: Sequence[Segment]) -> dict[tuple[str, str], Tensor]:
        """The unit's tensors by (weight, part); they share the buffer's memory."""
        if self.ready is not None:
            stream = torch.cuda.current_stream(self.data.device)
            stream.wait_event(self.ready)
            # The memory must not be given to the next copy before this stream is done with it.
            self.data.record_stream(stream)
        found, begin = {}, 0
        for segment in segments:
            raw = self.data[begin : begin + segment.nbytes]
            tensor = raw.view(TORCH_DTYPES[segment.dtype]).view(segment.shape)
            found[segment.weight, segment.part] = tensor
            begin += segment.nbytes
        return found


class HostMemory:
    """Buffers in main memory."""

    def __init__(self) -> None:
        self.meter = Meter()

    def fill(self, nbytes: int, read: Read) -> Buffer:
        """A buffer of `nbytes` that holds what `read` put there."""
        raw = np.empty(nbytes, dtype=np.uint8)
        self.meter.watch(raw, nbytes)
        read(raw.data)
        # The tensor, and every view of it, keep the array alive, and with it what is counted.
        return Buffer(torch.from_numpy(raw))

    def close(self) -> None:
        """Nothing is held beside the buffers."""


class CudaMemory:
    """Buffers on a GPU, filled through pinned memory on a stream of their own.

    Args:
        device: the GPU.
        largest: bytes of the largest unit; each reading thread pins as much.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        self.meter, self._device, self._largest = Meter(), device, largest
        self._stream = torch.cuda.Stream(device)
        self._local = threading.local()

    def fill(self, nbytes: int, read: Read) -> Buffer:
        """A buffer of `nbytes` whose copy from pinned memory has been started."""
        stage = self._stage()
        # The stage may still be the source of this thread's last copy.
        stage.ready.synchronize()
        read(stage.host.numpy().data[:nbytes])
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            data = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            self.meter.watch(data, nbytes)
            data.copy_(stage.host[:nbytes], non_blocking=True)
            stage.ready.record(self._stream)
            ready = torch.cuda.Event()
            ready.record(self._stream)
        return Buffer(data, ready)

    def _stage(self) -> Any:
        if not hasattr(self._local, "host"):
            self._local.host = torch.empty(self._largest, dtype=torch.uint8, pin_memory=True)
            self._local.ready = torch.cuda.Event()
        return self._local

    def close(self) -> None:
        """Wait for the copies under way; pinned buffers leave with their threads."""
        self._stream.synchronize()


Memory = HostMemory | CudaMemory


def memory_of(device: torch.device, largest: int) -> Memory:
    """Memory for a model on `device`.

    Args:
        device: where the model computes.
        largest: bytes of the largest unit.
    """
    return CudaMemory(device, largest) if device.type == "cuda" else HostMemory()
