"""Results of a stage, one file per unit of work, so that an interrupted stage continues.

A unit is complete exactly when its file exists: files are written aside, synced and renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fissile.errors import CorruptCheckpoint
from fissile.io.publish import atomic_write_bytes

if TYPE_CHECKING:
    from torch import Tensor


class UnitStore:
    """Tensors and a small JSON record per unit.

    Args:
        folder: where the files live; None keeps nothing, for use without a run folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def under(self, name: str) -> UnitStore:
        """A store of its own below this one."""
        return UnitStore(None if self.folder is None else self.folder / name)

    def path(self, unit: str) -> Path | None:
        """File of a unit, or None when nothing is kept."""
        return None if self.folder is None else self.folder / f"{unit}.safetensors"

    def has(self, unit: str) -> bool:
        """Whether the unit is complete."""
        path = self.path(unit)
        return path is not None and path.exists()

    def save(
        self, unit: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any] | None = None
    ) -> None:
        """Write a unit; it exists afterwards, whole, or not at all."""
        path = self.path(unit)
        if path is None:
            return
        from safetensors.torch import save

        ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(record or {}, sort_keys=True)
        atomic_write_bytes(path, save(ready, metadata={"record": text}))

    def discard(self, unit: str) -> None:
        """Remove a unit that nothing will ask for any more."""
        path = self.path(unit)
        if path is not None:
            path.unlink(missing_ok=True)

    def load(self, unit: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and record of a complete unit.

        Raises:
            CorruptCheckpoint: the file cannot be read.
        """
        path = self.path(unit)
        if path is None:
            raise CorruptCheckpoint(f"unit {unit!r}: this store keeps nothing")
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {}).get("record", "{}"))
                return {key: file.get_tensor(key) for key in file.keys()}, record  # noqa: SIM118
        except (OSError, SafetensorError, json.JSONDecodeError) as err:
            raise CorruptCheckpoint(f"{path}: {err}") from None
