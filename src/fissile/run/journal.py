"""What a run folder remembers, so that a run continues where it was killed.

journal/run.json holds the recipe and the source the run was started with; journal/<stage>.json
exists exactly when the stage is finished; journal/<stage>/ holds its units.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.publish import atomic_write_json
from fissile.io.units import UnitStore

FORMAT = 1
_HEAD, _CORPUS = "run.json", "corpus"


class Journal:
    """The journal of one run folder.

    Args:
        out: the run folder; created if absent.
        identity: everything that decides the result (resolved recipe, source hash, versions).
        resume: continue an earlier run of the same identity.
        overwrite: discard an earlier run.

    A folder in which a run began and left nothing, because its settings or its text were refused,
    is begun anew without a flag.

    Raises:
        UsageError: the folder exists and neither flag is given, or the identity differs.
    """

    def __init__(
        self, out: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        self.out, self.folder = out, out / "journal"
        head = self.folder / _HEAD
        flat = _flatten({"format": FORMAT, **identity})
        if not resume and out.exists() and any(out.iterdir()):
            if overwrite:
                _discard(out)
            elif not head.exists() or self._holds_work():
                raise UsageError(f"{out} exists; pass --resume to continue it or --overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume and head.exists():
            _compare(head, flat)
        else:
            atomic_write_json(head, flat)

    def _holds_work(self) -> bool:
        """Whether a stage is finished or has left a unit; the installation's text is neither."""
        files = (p.relative_to(self.folder) for p in self.folder.rglob("*") if p.is_file())
        return any(name.parts[0] not in (_HEAD, _CORPUS) for name in files)

    def corpus(self) -> Path:
        """Folder of text built from this installation."""
        return self.folder / _CORPUS

    def store(self, stage: str) -> UnitStore:
        """Units of a stage."""
        return UnitStore(self.folder / stage)

    def finished(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None."""
        path = self.folder / f"{stage}.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise CorruptCheckpoint(f"{path}: {err}") from None

    def finish(self, stage: str, started: float, record: Mapping[str, Any]) -> dict[str, Any]:
        """Mark a stage as finished.

        Args:
            stage: its name.
            started: `time.monotonic()` at its beginning.
            record: what later stages and the report need of it; JSON.
        """
        full = {"seconds": round(time.monotonic() - started, 2), **record}
        atomic_write_json(self.folder / f"{stage}.json", full)
        return full


def _discard(out: Path) -> None:
    """Remove an earlier run, and nothing else: a folder without a journal is not ours."""
    if not (out / "journal" / _HEAD).exists():
        raise UsageError(f"{out} is not a run folder (no journal/run.json); it is left as it is")
    shutil.rmtree(out)
    out.mkdir()


def _compare(head: Path, flat: dict[str, Any]) -> None:
    try:
        old = json.loads(head.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{head}: {err}") from None
    for key in sorted({*old, *flat}):
        if old.get(key) != flat.get(key):
            raise UsageError(
                f"{head.parent.parent}: cannot resume: {key} was {old.get(key)!r} "
                f"and is {flat.get(key)!r}; use --overwrite or another --out"
            )


def _flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping to dotted keys, so that a difference can be named."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(item) if isinstance(item, tuple) else item
    return flat
