"""What an evaluation reports: the score, its items and every condition. Loads no torch.

The object that `fissile eval --json` prints, and that `--out FILE` stores (schema version 1):

    schema_version    1; raised when the meaning of a field changes
    task              perplexity, choices, mmlu or routing
    bits              width that was served, null for float weights
    n_tokens|n_items  predicted tokens (perplexity, routing: routed tokens), or items
    ppl|accuracy|…    the score (`SCORES` names the field), stderr its standard error
    higher_is_better  direction of the score
    by_domain|…       the score per domain, or by_subject
    seconds           wall time of the scoring, loading excluded
    metrics           further ones: name to {value, higher_is_better, by_domain|by_subject}; routing
                      keeps its tables here
    conditions        task_version, data, model, tokenizer_sha256, bos, context, batch_tokens,
                      limit, seed, dtype, code, versions, machine; for perplexity convention, for
                      items shots, template_sha256 and normalisation
    items             only in files and with --items, what comparisons are paired over:
                      {id, domain, nll (nats), tokens} of a document (a window under gptq), or
                      {id, subject, correct (credit 0..1), choice, answer, loglikelihoods} of an
                      item, loglikelihoods being what the choice was made by
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from fissile import __version__
from fissile.errors import UsageError
from fissile.eval.documents import sha256_files
from fissile.io.publish import atomic_write_json

Task = Literal["perplexity", "choices", "mmlu", "routing"]
SCHEMA_VERSION = 1
TASK_VERSIONS = {"perplexity": 2, "choices": 1, "mmlu": 1, "routing": 1}
"""Raised whenever the same model and data would get another score."""
SCORES = {"perplexity": "ppl", "routing": "entropy"}
"""Name of the score's field; "accuracy" for tasks of items."""
_BY_TOKENS = ("perplexity", "routing")
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Scored:
    """What scoring a model on a task found.

    Args:
        count: predicted tokens or items.
        value: the score.
        stderr: of the score, over documents or items; None if there was only one.
        groups: the score per domain or subject.
        details: conditions that belong to the task.
        metrics: further metrics, as in the module's schema.
        items: outcomes by item or document, as in the module's schema.
    """

    count: int
    value: float
    stderr: float | None
    groups: Mapping[str, float]
    details: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    items: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Result:
    """One evaluation.

    Args:
        task: what was measured.
        bits: width that was served, None for float weights.
        found: the score and its parts.
        seconds: wall time of the scoring, loading excluded.
        conditions: everything the score depends on.
    """

    task: Task
    bits: int | None
    found: Scored
    seconds: float
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The score: perplexity (lower is better) or accuracy (higher is better)."""
        return self.found.value

    def to_dict(self, *, items: bool = False) -> dict[str, Any]:
        """The module's schema; values that are not finite become None.

        Args:
            items: with the outcomes by item.
        """
        tokens = self.task in _BY_TOKENS
        found: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "bits": self.bits,
            "n_tokens" if tokens else "n_items": self.found.count,
            SCORES.get(self.task, "accuracy"): self.value,
            "stderr": self.found.stderr,
            "higher_is_better": self.task != "perplexity",
            "by_domain" if tokens else "by_subject": self.found.groups,
            "seconds": round(self.seconds, 3),
            "metrics": self.found.metrics,
            "conditions": self.conditions,
        }
        if items:
            found["items"] = self.found.items
        return dict(_finite(found))

    def to_json(self, *, items: bool = False) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(items=items), allow_nan=False, ensure_ascii=False)


def write_result(result: Result, path: Path) -> None:
    """Store a result with its items, for comparisons and reports.

    Args:
        result: what `evaluate` returned.
        path: JSON file; folders are made, an earlier file is replaced.

    Raises:
        UsageError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UsageError(f"{path}: cannot be written ({err.strerror or err})") from None
    atomic_write_json(path, result.to_dict(items=True))


def read_result(path: Path) -> dict[str, Any]:
    """Read what `fissile eval --out` wrote.

    Raises:
        UsageError: unreadable, not JSON, or not a result of this schema version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise UsageError(f"{path}: cannot be read ({err.strerror or err})") from None
    except ValueError as err:
        raise UsageError(f"{path}: not JSON ({err})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path}: schema_version {version!r}, {SCHEMA_VERSION} is read (write it with fissile"
            " eval --out)"
        )
    if data.get("task") not in TASK_VERSIONS or not isinstance(data.get("conditions"), dict):
        raise UsageError(f"{path}: no result (task {data.get('task')!r})")
    return dict(data)


def code() -> dict[str, str]:
    """Version of this package and hash of the code that evaluates."""
    folder = Path(__file__).resolve().parent
    return {"fissile": __version__, "eval_sha256": sha256_files(list(folder.glob("*.py")))}


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


def _finite(value: Any) -> Any:
    """A copy in which numbers that are not finite are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
