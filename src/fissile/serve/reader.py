"""One plane of one expert at a time, read from the artifact where it lies.

A stored weight of all experts is one tensor a plane, (E, ...), so a plane of one expert is one
contiguous range of it, and an expert's plane is such a range of the gate and up rows and one of the
down projection. A unit is what is read, kept and dropped as a whole: the codes that plane k adds in
both, and the floats of the k-bit weight where k is a width that will be served.

Nothing else is read: no readahead, no rounding to pages. What was read is dropped from the system's
page cache, or memory would hold every expert a second time.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from fissile import families
from fissile.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from fissile.families.artifact import float_shapes
from fissile.io.headers import ITEM_SIZES, CheckpointHeaders, TensorInfo
from fissile.io.manifest import MANIFEST_FILE, read_manifest
from fissile.kernels.layout import segment_names, stored_names
from fissile.serve.policies import Key

WEIGHTS = ("gate_up_proj", "down_proj")
_PAGE = 4096


@dataclass(frozen=True)
class Segment:
    """A contiguous range of one file, and the tensor it is.

    Args:
        weight: "gate_up_proj" or "down_proj".
        part: "plane_2", "theta_2", "tied_2" ...; empty for float weights.
        path: the file.
        offset: of the first byte in the file.
        dtype: safetensors name.
        shape: of this expert's part.
    """

    weight: str
    part: str
    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return ITEM_SIZES[self.dtype] * prod(self.shape)


class _Open(NamedTuple):
    descriptor: int
    mark: tuple[int, int, int, int]


def _mark(descriptor: int) -> tuple[int, int, int, int]:
    """What a change of an open file's contents cannot leave as it was, on a local file system."""
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _unchanged(descriptor: int, mark: tuple[int, int, int, int]) -> bool:
    """Whether an open file still bears its mark.

    A file that another one took the place of has lost its name, which moves the last of the times;
    without a name nobody else can open it any more, and what is open goes on.
    """
    *contents, changed = _mark(descriptor)
    same = contents == list(mark[:3])
    return same and (changed == mark[3] or os.fstat(descriptor).st_nlink == 0)


class ExpertFiles:
    """The units of an artifact and the files they lie in; safe to share between threads.

    A key is (layer, expert, plane), planes counted from 0 in load order.

    Args:
        headers: of the artifact.
        widths: that will be served, ascending; their floats belong to the units. Empty for experts
            that are stored as floats: they have one plane, the whole expert.
        keep_pages: leave what was read in the system's page cache.

    Attributes:
        layers: number of layers with experts.
        num_experts: experts of a layer.
        weights: of all experts together.
        parts: of every plane, which tensors it adds: "plane_2", "theta_2" ...; "" for floats.

    Raises:
        UnsupportedModel: no routed experts, or overlapping ones, which cannot be read apart.
        UsageError: a width that is not stored.
        CorruptCheckpoint: files, names or shapes are not what config.json and fissile.json say.
    """

    def __init__(
        self, headers: CheckpointHeaders, widths: Sequence[int], *, keep_pages: bool = False
    ) -> None:
        config = headers.config
        family = families.find(config)
        families.check_checkpoint(headers, family)
        routing = config.get("routing")
        if not routing or routing["kind"] == "static" or routing["layout"] != "disjoint":
            raise UnsupportedModel(f"{headers.folder}: holds no experts that can be read apart")
        self.folder, self._keep_pages = headers.folder, keep_pages
        self.layers, self.num_experts = config["num_base_layers"], routing["num_experts"]
        self.parts = self._planes(config.get("nested"), widths)
        self._widths = [int(parts[-1].rpartition("_")[2] or 0) for parts in self.parts]
        self._units = self._find(headers)
        self._sizes = {
            key: sum(segment.nbytes for segment in segments)
            for key, segments in self._units.items()
        }
        shapes = dict(float_shapes(family, config))
        self.weights = sum(prod(s) for name, s in shapes.items() if ".mlp.experts." in name)
        self._lock = threading.Lock()
        self._checksums: dict[Key, int] = {}
        self._files: dict[Path, _Open] = {}
        try:
            self._open({s.path for segments in self._units.values() for s in segments})
        except BaseException:
            self.close()
            raise

    def _planes(
        self, nested: Mapping[str, Any] | None, widths: Sequence[int]
    ) -> tuple[tuple[str, ...], ...]:
        if nested is None or not any(".experts." in name for name in nested["modules"]):
            if widths:
                raise UsageError(f"{self.folder}: bits {widths[-1]}: its experts are floats")
            return (("",),)
        needed: set[str] = set()
        tied = bool(nested.get("tied"))
        for width in widths:
            if width not in nested["widths"]:
                held = ", ".join(map(str, nested["widths"]))
                raise UsageError(f"{self.folder}: bits {width}: it holds {held}")
            needed |= set(segment_names(width, nested["widths"], tied))
        planes: list[tuple[str, ...]] = []
        for name in stored_names(nested["widths"], tied):
            if name in needed and name.startswith("plane"):
                planes.append((name,))
            elif name in needed:
                planes[-1] = (name, *planes[-1])
        return tuple(planes)

    def _find(self, headers: CheckpointHeaders) -> dict[Key, tuple[Segment, ...]]:
        units: dict[Key, tuple[Segment, ...]] = {}
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}.mlp.experts"
            for plane, parts in enumerate(self.parts):
                whole = []
                for weight, part in product(WEIGHTS, parts):
                    name = f"{prefix}.{weight}" + (f".{part}" if part else "")
                    if name not in headers.tensors:
                        raise UnsupportedModel(f"{self.folder}: only some experts are nested")
                    whole.append((weight, part, *headers.tensors[name]))
                # Wide items first, so that every part lies aligned in the unit's buffer.
                whole.sort(key=lambda item: -ITEM_SIZES[item[3].dtype])
                for expert in range(self.num_experts):
                    cut = (_row(expert, *item) for item in whole)
                    units[layer, expert, plane] = tuple(cut)
        return units

    def _open(self, paths: set[Path]) -> None:
        """Open all files now: what is changed from here on does not go unnoticed."""
        listed = read_manifest(self.folder)["files"]
        for path in sorted(paths):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as err:
                raise UsageError(f"{path}: cannot be read ({err.strerror})") from None
            self._files[path] = _Open(descriptor, _mark(descriptor))
            size = os.fstat(descriptor).st_size
            if path.name not in listed or listed[path.name]["bytes"] != size:
                raise CorruptCheckpoint(f"{path}: {size} bytes, {MANIFEST_FILE} says otherwise")
            # Without this the kernel reads ahead, into a page cache that is meant to be empty.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def keys(self) -> list[Key]:
        """All units: layer by layer, planes in load order, expert by expert."""
        return list(self._units)

    def size(self, key: Key) -> int:
        """Bytes of a unit."""
        return self._sizes[key]

    def segments(self, key: Key) -> tuple[Segment, ...]:
        """Where a unit lies, in the order in which `read` fills a buffer."""
        return self._units[key]

    def planes_of(self, bits: int | None) -> int:
        """Number of planes that a `bits`-wide load needs; None for float experts."""
        return 1 if bits is None else self._widths.index(bits) + 1

    def expert_bytes(self, bits: int | None) -> int:
        """Bytes of the largest expert at a width."""
        planes = range(self.planes_of(bits))
        return max(
            sum(self._sizes[layer, 0, plane] for plane in planes) for layer in range(self.layers)
        )

    def total_bytes(self, planes: int | None = None) -> int:
        """Bytes of all experts, or of their first `planes` planes."""
        limit = len(self.parts) if planes is None else planes
        return sum(size for key, size in self._sizes.items() if key[2] < limit)

    def read(self, key: Key, target: memoryview) -> int:
        """Read a unit into `target`, whose length is the unit's size.

        The file must be the one that was opened, unchanged, and a unit that is read again must have
        the bytes it had: what was changed is never computed with.

        Returns:
            Bytes read, the length of `target`.

        Raises:
            CorruptCheckpoint: the file was cut, changed or cannot be read; names expert and plane.
        """
        done, checksum = 0, 0
        for segment in self._units[key]:
            part = target[done : done + segment.nbytes]
            file = self._files[segment.path]
            self._fill(key, segment, file.descriptor, part)
            # After the read: what was written before it, or during it, has left its mark by now.
            if not _unchanged(file.descriptor, file.mark):
                raise self._distrust(key, segment.path, "the file was changed while it is in use")
            checksum = zlib.crc32(part, checksum)
            done += segment.nbytes
        with self._lock:
            expected = self._checksums.setdefault(key, checksum)
        if expected != checksum:
            path = self._units[key][0].path
            raise self._distrust(key, path, "its bytes are not those that were read before")
        return done

    def _fill(self, key: Key, segment: Segment, descriptor: int, part: memoryview) -> None:
        done = 0
        while done < len(part):
            try:
                got = os.preadv(descriptor, [part[done:]], segment.offset + done)
            except OSError as err:
                raise self._distrust(key, segment.path, f"reading failed ({err})") from None
            if not got:
                raise self._distrust(key, segment.path, "the file was cut short")
            done += got
        if not self._keep_pages:
            # Whole pages, or those at the edges would stay; other readers lose nothing but time.
            begin = segment.offset // _PAGE * _PAGE
            end = -(-(segment.offset + done) // _PAGE) * _PAGE
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)

    def _distrust(self, key: Key, path: Path, problem: str) -> CorruptCheckpoint:
        layer, expert, plane = key
        name = self.parts[plane][-1] or "weights"
        return CorruptCheckpoint(f"{path}: layer {layer}, expert {expert}, {name}: {problem}")

    def drop_pages(self) -> None:
        """Give back what loading the rest of the model left of the files in the page cache: the
        kernel reads ahead, into experts that lie between."""
        for file in self._files.values():
            if not self._keep_pages:
                os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files; no read may be under way."""
        files, self._files = self._files, {}
        for file in files.values():
            os.close(file.descriptor)


def _row(expert: int, weight: str, part: str, path: Path, info: TensorInfo) -> Segment:
    size = info.nbytes // info.shape[0]
    offset = info.begin + expert * size
    return Segment(weight, part, path, offset, info.dtype, info.shape[1:])
