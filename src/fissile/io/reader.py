"""Lazy reading of checkpoint tensors: exactly the bytes that are asked for, counted."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.headers import CheckpointHeaders, TensorInfo, open_checkpoint_headers

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
"""Safetensors dtype names to torch dtypes."""

_CHUNK = 1 << 24
"""Bytes per system call: bounds the transient copy beside the tensor itself."""


class TensorReader:
    """Reads tensors of a checkpoint folder by name; safe to share between threads.

    Args:
        source: a checkpoint or run folder, or headers that were already read.

    Attributes:
        headers: the validated headers.
        bytes_read: tensor bytes read so far (headers not included).

    Raises:
        UsageError, UnsupportedModel, CorruptCheckpoint: see `open_checkpoint_headers`.
    """

    def __init__(self, source: Path | CheckpointHeaders) -> None:
        if isinstance(source, CheckpointHeaders):
            self.headers = source
        else:
            self.headers = open_checkpoint_headers(Path(source))
        self.bytes_read = 0
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Names of all tensors, shard by shard in the order of their offsets."""
        return list(self.headers.tensors)

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor.

        Raises:
            CorruptCheckpoint: the checkpoint holds no such tensor.
        """
        return self._find(name)[1]

    def path(self, name: str) -> Path:
        """File that holds a tensor.

        Raises:
            CorruptCheckpoint: the checkpoint holds no such tensor.
        """
        return self._find(name)[0]

    def load(self, name: str, dtype: torch.dtype | None = None, *, check: bool = False) -> Tensor:
        """Read one tensor.

        Args:
            name: its name in the checkpoint.
            dtype: convert to this type; None keeps the stored one.
            check: raise when the tensor holds NaN or infinities.

        Raises:
            CorruptCheckpoint: no such tensor, the file became shorter, or `check` failed.
        """
        path, info = self._find(name)
        return self._load(name, path, info, 0, dtype, check)

    def load_rows(
        self,
        name: str,
        begin: int,
        end: int,
        dtype: torch.dtype | None = None,
        *,
        check: bool = False,
    ) -> Tensor:
        """Read rows [begin, end) of the first axis, as `load`.

        Raises:
            ValueError: the tensor has no such rows.
            CorruptCheckpoint: as `load`.
        """
        path, info = self._find(name)
        if not info.shape or not 0 <= begin <= end <= info.shape[0]:
            raise ValueError(f"{name}: no rows [{begin}, {end}) in shape {list(info.shape)}")
        row = info.nbytes // max(info.shape[0], 1)
        shape = (end - begin, *info.shape[1:])
        part = TensorInfo(info.dtype, shape, info.begin + begin * row, info.begin + end * row)
        return self._load(name, path, part, begin, dtype, check)

    def close(self) -> None:
        """Close the files; a later load opens them again."""
        with self._lock:
            files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, name: str) -> tuple[Path, TensorInfo]:
        if name not in self.headers.tensors:
            raise CorruptCheckpoint(f"{self.headers.folder}: tensor {name!r} is missing")
        return self.headers.tensors[name]

    def _load(
        self,
        name: str,
        path: Path,
        info: TensorInfo,
        first_row: int,
        dtype: torch.dtype | None,
        check: bool,
    ) -> Tensor:
        raw = torch.empty(info.nbytes, dtype=torch.uint8)
        self._fill(raw.numpy().data, path, info.begin, name)
        tensor = raw.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)
        if check:
            check_finite(name, tensor, path, first_row)
        return tensor if dtype is None else tensor.to(dtype)

    def _fill(self, target: memoryview, path: Path, offset: int, name: str) -> None:
        descriptor, done = self._open(path), 0
        while done < len(target):
            # pread keeps no file position, so threads can share the descriptor.
            got = os.pread(descriptor, min(_CHUNK, len(target) - done), offset + done)
            if not got:
                raise CorruptCheckpoint(f"{path}: tensor {name!r} ends early, the file was cut")
            target[done : done + len(got)] = got
            done += len(got)
        with self._lock:
            self.bytes_read += done

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = os.open(path, os.O_RDONLY)
                except OSError as err:
                    raise UsageError(f"{path}: cannot be read ({err.strerror})") from None
            return self._files[path]


def check_finite(name: str, tensor: Tensor, path: Path | None = None, first_row: int = 0) -> None:
    """Refuse a float tensor that holds NaN or infinities; other dtypes pass.

    Args:
        name: the tensor's name, for the message.
        tensor: any shape and dtype.
        path: its file, for the message.
        first_row: row of the stored tensor that `tensor` begins with, for the message.

    Raises:
        CorruptCheckpoint: names file, tensor, count and first position.
    """
    if not tensor.is_floating_point():
        return
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    width = rows.shape[1]
    # Blocks of rows: the mask of a whole embedding table would cost half the table again.
    step = max(1, _CHUNK // max(width, 1))
    bad, first = 0, -1
    for begin in range(0, rows.shape[0], step):
        block = rows[begin : begin + step]
        block = block.float() if block.element_size() == 1 else block
        wrong = ~torch.isfinite(block)
        if count := int(wrong.sum()):
            if not bad:
                first = begin * width + int(wrong.flatten().nonzero()[0])
            bad += count
    if bad:
        where = [first] if tensor.dim() < 2 else [first_row + first // width, first % width]
        file = f"{path}: " if path else ""
        raise CorruptCheckpoint(
            f"{file}tensor {name!r} holds {bad} values that are NaN or infinite, first at {where}"
        )
