"""The manifest notices every kind of change, and the same files give the same manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fissile import __version__
from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.manifest import Origin, check_manifest, write_manifest

ORIGIN = Origin(source={"name": "org/dense", "revision": "abc"}, seed=3, recipe_sha256="r" * 64)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "data").write_bytes(bytes(range(256)) * 100)
    write_manifest(folder, ORIGIN)
    return folder


def test_contents(artifact: Path) -> None:
    manifest = json.loads((artifact / "fissile.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["seed"] == 3
    assert manifest["source"] == {"name": "org/dense", "revision": "abc"}
    assert manifest["recipe_sha256"] == "r" * 64
    assert manifest["versions"]["fissile"] == __version__
    assert {"python", "torch", "transformers"} <= manifest["versions"].keys()
    assert list(manifest["files"]) == ["config.json", "sub/data"]
    data = bytes(range(256)) * 100
    digest = hashlib.sha256(data).hexdigest()
    assert manifest["files"]["sub/data"] == {"sha256": digest, "bytes": len(data)}
    assert check_manifest(artifact) == []


def test_no_date_in_it(artifact: Path) -> None:
    first = (artifact / "fissile.json").read_bytes()
    write_manifest(artifact, ORIGIN)
    assert (artifact / "fissile.json").read_bytes() == first


def _flip(folder: Path) -> None:
    path = folder / "sub" / "data"
    raw = bytearray(path.read_bytes())
    raw[500] ^= 1
    path.write_bytes(raw)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped bit": (_flip, "sub/data: contents changed"),
    "longer": (lambda d: (d / "config.json").write_text("{} "), "config.json: 3 bytes"),
    "missing": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "added": (lambda d: (d / "extra.py").write_text("1"), "extra.py: not in fissile.json"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_is_noticed(case: str, artifact: Path) -> None:
    change, expected = CHANGES[case]
    change(artifact)
    problems = check_manifest(artifact)
    assert len(problems) == 1
    assert problems[0].startswith(expected)
    quick = check_manifest(artifact, hashes=False)
    assert len(quick) == (0 if case == "flipped bit" else 1)


def test_caches_of_python_do_not_count(artifact: Path) -> None:
    (artifact / "__pycache__").mkdir()
    (artifact / "__pycache__" / "m.pyc").write_text("x")
    assert check_manifest(artifact) == []


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"format_version": 2, "files": {}}',
        '{"format_version": 1, "files": []}',
        '{"format_version": 1, "files": {"a": {"sha256": 1, "bytes": 2}}}',
        '{"format_version": 1, "files": {"a": 7}}',
    ],
)
def test_malformed_manifests(text: str, artifact: Path) -> None:
    (artifact / "fissile.json").write_text(text)
    with pytest.raises(CorruptCheckpoint, match=r"fissile\.json: "):
        check_manifest(artifact)


def test_no_manifest_and_links(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no fissile\.json"):
        check_manifest(tmp_path)
    (artifact / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="this is a link"):
        write_manifest(artifact, ORIGIN)
