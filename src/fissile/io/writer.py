"""Streaming safetensors writer: tensors lie in the shards in the order of the plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO

import torch
from torch import Tensor

from fissile.io.headers import INDEX_FILE, ITEM_SIZES, SINGLE_FILE
from fissile.io.publish import atomic_write_json, disk_errors
from fissile.io.reader import TORCH_DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""Torch dtypes to safetensors dtype names."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `dtype` is a safetensors name such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEM_SIZES[self.dtype] * prod(self.shape)


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: tuple[PlannedTensor, ...]

    def header(self) -> bytes:
        fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            end = offset + tensor.nbytes
            fields[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(fields, separators=(",", ":")).encode()
        # Data must begin at a multiple of 8: loaders view the mapped bytes in place.
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(plan: Sequence[PlannedTensor], max_shard_bytes: int) -> list[_Shard]:
    """Cut a plan into shards, keeping its order.

    A shard ends where the next tensor would exceed `max_shard_bytes` (a larger tensor gets a shard
    of its own) or would not lie at a multiple of its element size: the format forbids padding
    between tensors, and loaders refuse unaligned views.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in plan:
        unaligned = size % ITEM_SIZES[tensor.dtype] != 0
        if groups[-1] and (unaligned or size + tensor.nbytes > max_shard_bytes):
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    if len(groups) == 1:
        return [_Shard(SINGLE_FILE, tuple(groups[0]))]
    total = len(groups)
    return [
        _Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


class ShardWriter:
    """Writes planned tensors one after the other; memory use is one tensor.

    The same plan and values give the same bytes. Tensors lie in the files in the order of the plan.

    Args:
        folder: existing folder that receives the files.
        plan: all tensors in the order in which they will be written.
        max_shard_bytes: most tensor bytes per file.

    Raises:
        ValueError: a name twice, an unknown dtype.
    """

    def __init__(self, folder: Path, plan: Sequence[PlannedTensor], max_shard_bytes: int) -> None:
        names = {tensor.name for tensor in plan}
        if len(names) != len(plan):
            raise ValueError("the plan names a tensor twice")
        if unknown := [t for t in plan if t.dtype not in DTYPE_NAMES.values()]:
            raise ValueError(f"{unknown[0].name}: unknown dtype {unknown[0].dtype!r}")
        self.folder = Path(folder)
        self.shards = plan_shards(plan, max_shard_bytes)
        self._todo = [(shard, tensor) for shard in self.shards for tensor in shard.tensors]
        self._next = 0
        self._file: IO[bytes] | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the plan; its dtype and shape are those that were planned.

        Raises:
            ValueError: another tensor is next, or dtype or shape differ from the plan.
            ResourceError: the disk is full.
        """
        self.write_parts(name, [tensor], tensor.shape)

    def write_parts(
        self, name: str, parts: Iterable[Tensor], shape: Sequence[int] | None = None
    ) -> None:
        """Write the next tensor as consecutive blocks of its first axis, as `write`.

        Args:
            name: the tensor's name.
            parts: blocks of rows; never held at the same time.
            shape: shape of the whole, when the caller wants it compared with the plan.
        """
        shard, planned = self._expect(name)
        if shape is not None and tuple(shape) != planned.shape:
            raise ValueError(f"{name}: shape {list(shape)}, planned {list(planned.shape)}")
        with disk_errors(self.folder):
            file = self._open(shard)
            written = 0
            for part in parts:
                if DTYPE_NAMES.get(part.dtype) != planned.dtype:
                    raise ValueError(f"{name}: dtype {part.dtype}, planned {planned.dtype}")
                block = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                file.write(block.numpy().data)
                written += block.numel()
        if written != planned.nbytes:
            raise ValueError(f"{name}: {written} bytes, planned {planned.nbytes}")
        self._next += 1

    def close(self) -> None:
        """Finish the last shard and write the index, if there is more than one shard.

        Raises:
            ValueError: a planned tensor was not written.
            ResourceError: the disk is full.
        """
        if self._next < len(self._todo):
            raise ValueError(f"{self._todo[self._next][1].name}: planned but not written")
        with disk_errors(self.folder):
            if not self._todo:
                self._open(self.shards[0])
            self._close_file()
            if len(self.shards) > 1:
                total = sum(tensor.nbytes for _, tensor in self._todo)
                files = {tensor.name: shard.name for shard, tensor in self._todo}
                index = {"metadata": {"total_size": total}, "weight_map": files}
                atomic_write_json(self.folder / INDEX_FILE, index)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            # The folder is half-written; whoever owns it removes it (see `published`).
            self._file.close()

    def _expect(self, name: str) -> tuple[_Shard, PlannedTensor]:
        if self._next == len(self._todo):
            raise ValueError(f"{name}: every planned tensor is already written")
        shard, planned = self._todo[self._next]
        if name != planned.name:
            raise ValueError(f"{name}: the next planned tensor is {planned.name}")
        return shard, planned

    def _open(self, shard: _Shard) -> IO[bytes]:
        path = self.folder / shard.name
        if self._file is None or self._file.name != str(path):
            self._close_file()
            self._file = open(path, "wb")  # noqa: SIM115
            # Servers often run as another user; the umask must not decide whether they can read.
            os.fchmod(self._file.fileno(), 0o644)
            self._file.write(shard.header())
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
