"""What the benches of quantizers share: the model, its text, and how it is scored.

Shapes: N windows, S tokens per window.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fissile.config import Strict
from fissile.errors import UsageError
from fissile.io.publish import atomic_write_bytes, atomic_write_json
from fissile.run.peers import gap_of

if TYPE_CHECKING:
    from torch import Tensor

    from fissile.eval.perplexity import HeldOut
    from fissile.models.source import CheckpointSource
    from fissile.models.stream import StateSource


class TextSettings(Strict):
    """Model and text of a bench of quantizers."""

    models: tuple[str, ...] = Field((), description="the dense model's folder")
    calibration: str | None = Field(None, description="JSONL; default this installation's text")
    held_out: str | None = Field(None, description="JSONL; default this installation's text")
    tokens: int = Field(65536, gt=0, description="calibration tokens")
    context: int = Field(512, ge=8, description="tokens of a window")
    held_out_tokens: int = Field(65536, gt=0, description="over all domains, divided evenly")
    folder: str = Field("runs/peers", description="results, kept and resumed")


@dataclass(frozen=True)
class Material:
    """Model, text and measure of a bench; results that all systems need are kept in its folder.

    Attributes:
        source: the dense checkpoint.
        calibration: JSONL.
        held_out: JSONL.
        tokens: of calibration.
        context: tokens of a window, in calibration and on held-out text.
        held_out_tokens: over all domains.
        root: folder of all results.
    """

    source: CheckpointSource
    calibration: Path
    held_out: Path
    tokens: int
    context: int
    held_out_tokens: int
    root: Path

    def windows(self, seed: int) -> tuple[Tensor, Path]:
        """Calibration windows int64 (N, S) of a seed, and the safetensors that hold them as ids."""
        from safetensors.torch import load_file, save

        from fissile.eval.documents import read_documents
        from fissile.eval.tokens import load_tokenizer
        from fissile.eval.windows import sample_windows

        path = self.root / f"tokens_{seed}.safetensors"
        if not path.exists():
            ids_NS, _, _ = sample_windows(
                read_documents(self.calibration),
                load_tokenizer(self.source.folder),
                self.tokens,
                min(self.context, self.source.config.max_position_embeddings),
                seed,
                config=self.source.config,
            )
            atomic_write_bytes(path, save({"ids": ids_NS.contiguous()}))
        return load_file(path)["ids"], path

    def dense(self, seed: int) -> dict[str, Any]:
        """Perplexity of the dense model on the held-out windows of a seed, in all and by domain."""
        path = self.root / "dense" / f"seed_{seed}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            score = _measured(self, self.source, seed)
            atomic_write_json(path, {k: score[k] for k in ("ppl", "by_domain", "n_tokens")})
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def score(self, model: StateSource, seed: int) -> dict[str, Any]:
        """Gap of a model to the dense one, in nats per token, and its perplexity by domain.

        Raises:
            UsageError: the dense model was scored on other text.
        """
        dense, found = self.dense(seed), _measured(self, model, seed)
        if found["n_tokens"] != dense["n_tokens"]:
            raise UsageError(f"{self.root}: the dense model was scored on other documents")
        by_domain = found["by_domain"]
        return {"gap": gap_of(by_domain, dense["by_domain"]), "by_domain": by_domain}


def _measured(material: Material, model: StateSource, seed: int) -> dict[str, Any]:
    from fissile.eval.perplexity import measure
    from fissile.models.source import load_source

    return measure(load_source(model).eval(), _held_out(material, seed)).score()


@cache
def _held_out(material: Material, seed: int) -> HeldOut:
    from fissile.eval.documents import read_documents
    from fissile.eval.perplexity import prepare
    from fissile.eval.tokens import load_tokenizer

    config = material.source.config
    return prepare(
        config,
        load_tokenizer(material.source.folder),
        read_documents(material.held_out),
        context=min(material.context, config.max_position_embeddings),
        tokens=material.held_out_tokens,
        seed=seed,
    )


def read_material(settings: TextSettings) -> Material:
    """Model and text, all checked before any work.

    Raises:
        UsageError: no model or several, or an artifact.
    """
    from fissile.eval.documents import read_documents
    from fissile.models.source import CheckpointSource

    if len(settings.models) != 1:
        raise UsageError("needs the folder of one dense model: fissile bench NAME MODEL_DIR")
    root = Path(settings.folder)
    source = CheckpointSource(Path(settings.models[0]))
    if source.artifact:
        raise UsageError(f"{source.folder}: is an artifact; this quantizes a dense float model")
    for given in (settings.calibration, settings.held_out):
        if given is not None:
            read_documents(Path(given))
    calibration, held_out = _text(settings, root)
    sizes = (settings.tokens, settings.context, settings.held_out_tokens)
    return Material(source, calibration, held_out, *sizes, root)


def _text(settings: TextSettings, root: Path) -> tuple[Path, Path]:
    """Files of calibration and held-out text."""
    if settings.calibration and settings.held_out:
        return Path(settings.calibration), Path(settings.held_out)
    from fissile.eval.corpus import build_corpus

    corpus = build_corpus(root / "corpus")
    calibration = settings.calibration or corpus.calibration
    return Path(calibration), Path(settings.held_out or corpus.heldout)


def conditions_of(material: Material) -> dict[str, Any]:
    """Model, text and sizes, for a result."""
    from fissile.eval.documents import sha256_files
    from fissile.eval.result import model_sha256

    texts = {"calibration": material.calibration, "held_out": material.held_out}
    return {
        "model_sha256": model_sha256(material.source.folder),
        "text_sha256": {name: sha256_files([path]) for name, path in texts.items()},
        "tokens": material.tokens,
        "context": material.context,
        "held_out_tokens": material.held_out_tokens,
    }


def hold_to(root: Path, conditions: dict[str, Any]) -> None:
    """Let a folder hold results of these conditions only; it is made if need be.

    Raises:
        UsageError: it holds results of others.
    """
    path = root / "conditions.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key, value in conditions.items() if kept.get(key) != value]
        if other:
            raise UsageError(f"{root}: holds results with another {', '.join(other)}")
    root.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, conditions)
