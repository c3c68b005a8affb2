"""Output that is either complete or absent: write aside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fissile.errors import ResourceError, UsageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a ResourceError that names the folder."""
    try:
        yield
    except OSError as err:
        if err.errno not in _FULL:
            raise
        reason = os.strerror(err.errno or 0).lower()
        raise ResourceError(f"{folder}: {reason} while writing") from err


@contextlib.contextmanager
def published(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Offer a private folder beside `out`; it becomes `out` when the block ends without an error.

    What dead processes left behind is removed first. On any error, an interrupt included, the
    private folder is removed and `out` stays as it was.

    Args:
        out: folder to create; its parents are created as needed.
        overwrite: replace an existing checkpoint or run folder.

    Raises:
        UsageError: `out` exists (and may not be replaced), or cannot be created.
        ResourceError: the disk is full.
    """
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Before the check: an interrupted replacement may have to bring an earlier output back.
        clean_leftovers(out)
        _check_target(out, overwrite)
        partial = out.parent / f".{out.name}.partial-{os.getpid()}"
        partial.mkdir()
    except OSError as err:
        if err.errno in _FULL:
            raise ResourceError(f"{out.parent}: no space left for {out.name}") from err
        raise UsageError(f"{out}: cannot be created ({err.strerror})") from None
    try:
        with disk_errors(out.parent):
            yield partial
            _sync_tree(partial)
            _replace(partial, out, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def clean_leftovers(out: Path) -> None:
    """Undo what dead processes left beside `out`: partial folders, interrupted replacements."""
    for old in _siblings(out, "replaced"):
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # Killed between the two renames of a replacement: the earlier output comes back.
            os.rename(old, out)
    for partial in _siblings(out, "partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old bytes or the new ones, never a mixture.

    Raises:
        ResourceError: the disk is full; the old file is untouched.
    """
    path = Path(path)
    partial = path.parent / f".{path.name}.partial-{os.getpid()}"
    try:
        with disk_errors(path.parent):
            with open(partial, "wb") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def atomic_write_json(path: Path, value: Any) -> None:
    """Write indented JSON, keys in the given order, as `atomic_write_bytes`."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(path, (text + "\n").encode())


def _check_target(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UsageError(f"{out}: already exists; choose another --out or remove it")
    # Only what looks like our own kind of output is ever deleted.
    marks = ("config.json", "fissile.json", "recipe.yaml")
    ours = out.is_dir() and not out.is_symlink()
    if not ours or (any(out.iterdir()) and not any((out / name).is_file() for name in marks)):
        raise UsageError(f"{out}: exists and is no checkpoint or run folder; it is not replaced")


def _replace(partial: Path, out: Path, overwrite: bool) -> None:
    _check_target(out, overwrite)
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(partial, out)
    except BaseException:
        if old.exists():
            os.rename(old, out)
        raise
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _siblings(out: Path, kind: str) -> list[Path]:
    """Entries `.NAME.KIND-PID` beside `out` whose process is gone (or is this one)."""
    prefix = f".{out.name}.{kind}-"
    found = [p for p in out.parent.iterdir() if p.name.startswith(prefix)]
    return sorted(p for p in found if not _alive(p.name.removeprefix(prefix)))


def _alive(pid: str) -> bool:
    if not pid.isdecimal() or int(pid) == os.getpid():
        # After a kill, a container often gives the next process the same number.
        return not pid.isdecimal()
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))
