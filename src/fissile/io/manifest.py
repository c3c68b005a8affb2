"""fissile.json: what an artifact consists of and where it came from, with a hash of every file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fissile import __version__
from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.headers import read_json
from fissile.io.publish import atomic_write_json

MANIFEST_FILE = "fissile.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Origin:
    """Where an artifact came from.

    Args:
        source: name of the dense checkpoint and its revision (hub commit) or header hash.
        seed: the recipe's seed.
        recipe_sha256: hash of the resolved recipe, None when there was none.
    """

    source: Mapping[str, str | None]
    seed: int | None = None
    recipe_sha256: str | None = None


def versions() -> dict[str, str]:
    """Versions of fissile, python and the packages that decide the bytes; imports none of them."""
    found = {"fissile": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def file_sha256(path: Path) -> str:
    """Hash a file in blocks; memory use does not depend on its size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, origin: Origin) -> dict[str, Any]:
    """Hash every file of a finished artifact and write fissile.json beside them.

    The same files and origin give the same bytes: there is no date in it.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: the folder holds a link, which a hash would not pin.
        ResourceError: the disk is full.
    """
    files = {}
    for name in _files(folder):
        path = folder / name
        if path.is_symlink():
            raise ValueError(f"{path}: an artifact holds plain files, this is a link")
        files[name] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": versions(),
        "seed": origin.seed,
        "source": dict(origin.source),
        "recipe_sha256": origin.recipe_sha256,
        "files": files,
    }
    atomic_write_json(folder / MANIFEST_FILE, manifest)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the form of fissile.json.

    Raises:
        UsageError: there is none.
        CorruptCheckpoint: malformed, or of an unknown format version.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UsageError(f"{folder}: holds no {MANIFEST_FILE}, it is no artifact of fissile")
    manifest = read_json(path)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise CorruptCheckpoint(f"{path}: format_version {found!r}, accepted: {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CorruptCheckpoint(f"{path}: files must map names to sha256 and bytes")
    return manifest


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    return isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int


def check_manifest(folder: Path, *, hashes: bool = True) -> list[str]:
    """Compare an artifact with its manifest.

    Args:
        folder: the artifact.
        hashes: compare contents too; otherwise only presence and sizes.

    Returns:
        One line per problem: missing, added, resized or changed files. Empty when all is well.

    Raises:
        UsageError, CorruptCheckpoint: see `read_manifest`.
    """
    listed = read_manifest(folder)["files"]
    present = set(_files(folder))
    problems = [f"{name}: not in {MANIFEST_FILE}" for name in sorted(present - set(listed))]
    for name, entry in sorted(listed.items()):
        if name not in present:
            problems.append(f"{name}: missing")
            continue
        size = (folder / name).stat().st_size
        if size != entry["bytes"]:
            problems.append(f"{name}: {size} bytes, {MANIFEST_FILE} says {entry['bytes']}")
        elif hashes and file_sha256(folder / name) != entry["sha256"]:
            problems.append(f"{name}: contents changed, sha256 differs from {MANIFEST_FILE}")
    return problems


def _files(folder: Path) -> list[str]:
    found = []
    for root, folders, names in os.walk(folder):
        # Python leaves caches beside a modeling file that it imports; they are not ours.
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        # A linked folder is not entered; it is listed, so that it is noticed.
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in [*names, *links]:
            found.append((Path(root) / name).relative_to(folder).as_posix())
    return sorted(name for name in found if name != MANIFEST_FILE)
