"""What an evaluation reports: the score and every condition it depends on. Loads no torch."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from fissile import __version__
from fissile.eval.documents import sha256_files

Task = Literal["perplexity", "choices"]
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Result:
    """One evaluation.

    Args:
        task: what was measured.
        bits: width that was served, None for float weights.
        count: predicted tokens (perplexity) or items (choices).
        value: perplexity (lower is better) or accuracy (higher is better).
        stderr: of the value, over documents or items; None if there was only one.
        groups: the value per domain or subject.
        seconds: wall time of the scoring, loading excluded.
        conditions: everything the value depends on.
    """

    task: Task
    bits: int | None
    count: int
    value: float
    stderr: float | None
    groups: dict[str, float]
    seconds: float
    conditions: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The object that `fissile eval --json` prints; values that are not finite become None."""
        tokens = self.task == "perplexity"
        return {
            "task": self.task,
            "bits": self.bits,
            "n_tokens" if tokens else "n_items": self.count,
            "ppl" if tokens else "accuracy": _finite(self.value),
            "stderr": _finite(self.stderr),
            "by_domain" if tokens else "by_subject": {
                name: _finite(value) for name, value in self.groups.items()
            },
            "seconds": round(self.seconds, 3),
            "conditions": self.conditions,
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)


def versions() -> dict[str, str]:
    """Versions of Python, fissile and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "fissile": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and threads; torch's thread count only if torch is loaded already."""
    torch = sys.modules.get("torch")
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
    }


def model_sha256(folder: Path) -> str:
    """Hash that identifies a model folder's configuration and weights.

    An artifact's manifest lists the hash of each of its files, so hashing it is enough; of other
    folders the configuration and the weight files are hashed whole.

    Args:
        folder: local model folder.
    """
    manifest = folder / "fissile.json"
    if manifest.is_file():
        return sha256_files([manifest])
    return sha256_files([*folder.glob("config.json"), *folder.glob("*.safetensors")])


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
