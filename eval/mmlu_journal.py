"""Finished subjects of an evaluation, kept beside its output until that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.publish import atomic_write_json


class Journal:
    """One JSON file per subject in OUT.journal/, and one that says what they belong to.

    Args:
        out: the file that the evaluation will write.
        identity: everything that the outcomes depend on; plain JSON values.
        resume: keep what an earlier call of the same identity finished; else it is removed.

    Raises:
        UsageError: the identity differs, or the folder cannot be made.
        CorruptCheckpoint: the record of an earlier call does not parse.
    """

    def __init__(self, out: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = _folder(out)
        head = self.folder / "run.json"
        if head.is_file() and resume:
            old = _load(head)
            for key in sorted({*old, *identity}):
                if old.get(key) != identity.get(key):
                    raise UsageError(
                        f"{self.folder}: cannot resume: {key} was {old.get(key)!r} and is"
                        f" {identity.get(key)!r}; leave --resume out to start again"
                    )
            return
        try:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True)
        except OSError as err:
            raise UsageError(f"{self.folder}: cannot be written ({err.strerror or err})") from None
        atomic_write_json(head, dict(identity))

    def load(self, subject: str) -> dict[str, Any] | None:
        """What was saved for a subject, or None."""
        path = self.folder / f"{subject}.json"
        return _load(path) if path.is_file() else None

    def save(self, subject: str, record: Mapping[str, Any]) -> None:
        """Keep a finished subject."""
        atomic_write_json(self.folder / f"{subject}.json", dict(record))


def remove_journal(out: Path) -> None:
    """Remove the journal beside a file that holds everything now."""
    shutil.rmtree(_folder(out), ignore_errors=True)


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.journal")


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{path}: not readable JSON ({err})") from None
