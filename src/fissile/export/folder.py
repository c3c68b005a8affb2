"""What every exported folder has beside its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fissile.io.hub import copied_files
from fissile.io.manifest import Origin, write_manifest
from fissile.io.publish import atomic_write_bytes


def add_config(folder: Path, config: Mapping[str, Any], source: Path) -> None:
    """Write config.json, and copy tokenizer, templates and generation settings byte for byte.

    Args:
        folder: unfinished.
        config: contents of config.json.
        source: folder of the model that is exported.
    """
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    atomic_write_bytes(folder / "config.json", text.encode())
    for path in copied_files(source):
        shutil.copyfile(path, folder / path.name)


def seal(folder: Path, card: str, origin: Origin) -> dict[str, Any]:
    """Write the card, let other users read every file, and write the manifest last.

    Safetensors files are private to their owner, whatever the umask; a server is often another.

    Args:
        folder: complete but for these.
        card: text of README.md.
        origin: recorded in the manifest.

    Returns:
        The manifest.
    """
    atomic_write_bytes(folder / "README.md", card.encode())
    for path in folder.iterdir():
        path.chmod(0o644)
    return write_manifest(folder, origin)
