"""Safetensors headers and checkpoint folders, read without torch and without trusting a byte.

The format: 8 bytes little-endian header length, a JSON header, the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from fissile.errors import CorruptCheckpoint, UnsupportedModel, UsageError

ITEM_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes per element of every accepted dtype."""

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own implementation; a longer header is an attack or noise."""

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FIELDS = {"dtype", "shape", "data_offsets"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_BIN_REMEDY = (
    "convert it with transformers: "
    "AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(OUT), which writes safetensors"
)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file; `begin` and `end` are absolute byte offsets."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsHeader:
    """A validated header; tensors are in the order of their offsets."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclass(frozen=True)
class CheckpointHeaders:
    """config.json and the headers of all shards of a checkpoint folder."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, tuple[Path, TensorInfo]]
    total_bytes: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of one safetensors file; no tensor data is read.

    Raises:
        CorruptCheckpoint: truncated or oversized header, not UTF-8 or not JSON, duplicate names,
            unknown dtype, byte counts that do not match shapes, overlaps, holes, trailing bytes.
        UsageError: the file does not exist or cannot be opened.
    """
    try:
        # O_NONBLOCK: a named pipe must not make the check wait for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path}: not a regular file")
            raw, data_begin = _read_raw(file, path, status.st_size)
    except OSError as err:
        raise UsageError(f"{path}: cannot be read ({err.strerror})") from None
    fields = _parse(raw, path)
    metadata = fields.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        _corrupt(path, "__metadata__ must map strings to strings")
    tensors = {name: _tensor(path, name, entry, data_begin) for name, entry in fields.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_layout(path, ordered, data_begin, status.st_size)
    return SafetensorsHeader(path, ordered, metadata)


def _corrupt(path: Path, problem: str) -> NoReturn:
    raise CorruptCheckpoint(f"{path}: {problem}")


def _read_raw(file: BinaryIO, path: Path, size: int) -> tuple[bytes, int]:
    if size < 8:
        _corrupt(path, f"truncated: {size} bytes, a safetensors file has at least 8")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        _corrupt(path, f"header of {length} bytes, at most {MAX_HEADER_BYTES} are accepted")
    if 8 + length > size:
        _corrupt(path, f"truncated: the header ends at byte {8 + length}, the file at {size}")
    return file.read(length), 8 + length


def _parse(raw: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                _corrupt(path, f"header names {key!r} twice")
            found[key] = value
        return found

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as err:
        _corrupt(path, f"header is not UTF-8 at byte {8 + err.start}")
    except (ValueError, RecursionError):
        _corrupt(path, "header is not JSON")
    if not isinstance(fields, dict):
        _corrupt(path, "header is not a JSON object")
    return fields


def _counts(values: Any) -> bool:
    """Whether `values` is a list of integers in [0, 2^63); true and false are no integers."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _tensor(path: Path, name: str, entry: Any, data_begin: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        _corrupt(path, f"tensor {name!r} needs exactly the fields {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        _corrupt(path, f"tensor {name!r} has dtype {dtype!r}, accepted: {', '.join(ITEM_SIZES)}")
    if not _counts(shape) or len(shape) > 64:
        _corrupt(path, f"tensor {name!r} has a shape that is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _corrupt(path, f"tensor {name!r} has data_offsets that are not [begin, end]")
    expected = ITEM_SIZES[dtype]
    for size in shape:
        expected *= size
    if offsets[1] - offsets[0] != expected:
        found = offsets[1] - offsets[0]
        _corrupt(path, f"tensor {name!r} takes {found} bytes, {dtype} {shape} needs {expected}")
    return TensorInfo(dtype, tuple(shape), data_begin + offsets[0], data_begin + offsets[1])


def _check_layout(path: Path, tensors: dict[str, TensorInfo], begin: int, size: int) -> None:
    position = begin
    for name, info in tensors.items():
        if info.begin < position:
            _corrupt(path, f"tensor {name!r} overlaps the one before it at byte {info.begin}")
        if info.begin > position:
            _corrupt(path, f"hole of {info.begin - position} bytes before tensor {name!r}")
        if info.end > size:
            _corrupt(path, f"truncated at byte {size}: tensor {name!r} ends at {info.end}")
        position = info.end
    if position != size:
        _corrupt(path, f"{size - position} bytes after the last tensor")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: the file cannot be read.
        CorruptCheckpoint: it is not UTF-8, not JSON, or not an object.
    """
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as err:
        raise UsageError(f"{path}: cannot be read ({err.strerror})") from None
    except (ValueError, RecursionError):
        _corrupt(path, "not a JSON file")
    if not isinstance(found, dict):
        _corrupt(path, "not a JSON object")
    return found


def checkpoint_folder(folder: Path) -> Path:
    """Return `folder`, or its `model` folder when `folder` is a run folder.

    Raises:
        UsageError: no such folder, or no checkpoint in it.
    """
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not found"
        raise UsageError(f"{folder}: {found}; a checkpoint is a folder with config.json")
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise UsageError(f"{folder}: holds no config.json, a Hugging Face checkpoint does")


def weight_files(folder: Path) -> list[Path]:
    """Names of the safetensors files of a checkpoint, in shard order; the files may be missing.

    A single model.safetensors wins over an index, as in transformers.

    Raises:
        UnsupportedModel: only pickled or GGUF weights; the message says how to convert them.
        CorruptCheckpoint: an index that is malformed, or shards without an index.
        UsageError: no weights at all.
    """
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if index.exists():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    names = sorted(p.name for p in folder.iterdir())
    if pickled := [n for n in names if n.endswith(_PICKLED)]:
        raise UnsupportedModel(
            f"{folder}: {pickled[0]} is pickled, accepted: safetensors; {_BIN_REMEDY}"
        )
    if gguf := [n for n in names if n.endswith(".gguf")]:
        raise UnsupportedModel(f"{folder}: {gguf[0]} is a GGUF file, accepted: safetensors")
    if loose := [n for n in names if n.endswith(".safetensors")]:
        _corrupt(folder, f"{loose[0]} without {INDEX_FILE}, which says what the shards hold")
    raise UsageError(f"{folder}: holds no weights; {SINGLE_FILE} or {INDEX_FILE} is accepted")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _corrupt(index, "weight_map is not an object that names a shard for every tensor")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == os.path.basename(name) and name != ".."
        if not plain or not name.endswith(".safetensors") or "\0" in name:
            _corrupt(index, f"tensor {tensor!r} is in {name!r}, which is no shard in this folder")
    return weight_map


def open_checkpoint_headers(folder: Path) -> CheckpointHeaders:
    """Read config.json and every shard's header; answers in milliseconds for any model size.

    Args:
        folder: checkpoint folder, or a run folder that holds one in `model`.

    Raises:
        UsageError: no folder, no config.json, no weights, unreadable files.
        UnsupportedModel: pickled or GGUF weights.
        CorruptCheckpoint: malformed headers, a missing shard or tensor, a tensor in two shards.
    """
    folder = checkpoint_folder(Path(folder))
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for path in files:
        if not path.exists():
            _corrupt(path, f"missing, but named by {INDEX_FILE}; download or copy it again")
        for name, info in read_header(path).tensors.items():
            if name in tensors:
                _corrupt(path, f"tensor {name!r} is also in {tensors[name][0].name}")
            tensors[name] = (path, info)
    if files[0].name != SINGLE_FILE:
        for name, shard in _weight_map(folder / INDEX_FILE).items():
            if name not in tensors or tensors[name][0].name != shard:
                _corrupt(folder / shard, f"tensor {name!r} is missing, but {INDEX_FILE} names it")
    total = sum(info.nbytes for _, info in tensors.values())
    return CheckpointHeaders(folder, config, tensors, total)
