"""The tasks of `fissile eval`: how each reads its data and scores a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fissile.eval.choices import TEMPLATE, choices, read_items
from fissile.eval.conventions import score
from fissile.eval.documents import read_documents, sha256_files
from fissile.eval.expert_use import score_routing
from fissile.eval.mmlu import MmluOptions, mmlu
from fissile.eval.mmlu_data import MmluData, download_mmlu, read_mmlu
from fissile.eval.mmlu_journal import Journal
from fissile.eval.perplexity import Progress
from fissile.eval.result import Scored


@dataclass(frozen=True)
class Settings:
    """What the user may set, for tasks to take what concerns them.

    Args:
        context: tokens per window or item; None for the model's maximum, at most 2048.
        batch_tokens: padded tokens per forward pass.
        limit: use the first so many documents or items.
        convention: of a perplexity, see `fissile.eval.conventions`.
        progress: called with ("eval", done, total, detail).
        mmlu: what only that task takes.
        journal: where that task keeps finished subjects.
    """

    context: int | None = None
    batch_tokens: int = 8192
    limit: int | None = None
    convention: str = "fissile"
    progress: Progress | None = None
    mmlu: MmluOptions = field(default_factory=MmluOptions)
    journal: Journal | None = None

    def common(self) -> dict[str, Any]:
        """The arguments that all scorers share."""
        names = ("context", "batch_tokens", "limit", "progress")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TaskSpec:
    """One task.

    Args:
        read: data file (or folder) to what `score` takes; finds mistakes before a model is loaded.
        score: (model, tokenizer, what was read, settings) to the outcome.
        sha256: data and what was read to the hash that identifies it.
    """

    read: Callable[[Path, Settings], Any]
    score: Callable[[Any, Any, Any, Settings], Scored]
    sha256: Callable[[Path, Any], str] = lambda data, _: sha256_files([data])


def _perplexity(model: Any, tokenizer: Any, rows: Any, settings: Settings) -> Scored:
    convention = settings.convention
    return score(model, tokenizer, rows, convention=convention, **settings.common()).scored()


def _choices(model: Any, tokenizer: Any, rows: Any, settings: Settings) -> Scored:
    found = choices(model, tokenizer, rows, **settings.common())
    details = {
        "context": found.context,
        "bos": found.start,
        "shots": 0,
        "template_sha256": hashlib.sha256(TEMPLATE.encode()).hexdigest(),
        "normalisation": "mean log-likelihood per token",
        "n_ties": found.n_ties,
    }
    items = [
        {
            "id": str(item.line or number),
            "subject": item.subject,
            **({} if item.document is None else {"document": item.document}),
            "correct": credit,
            "choice": scores.index(max(scores)),
            "answer": item.answer,
            "loglikelihoods": list(scores),
        }
        for number, (item, credit, scores) in enumerate(
            zip(rows, found.credit, found.scores, strict=False), start=1
        )
    ]
    return Scored(found.n_items, found.accuracy, found.stderr, found.by_subject, details, {}, items)


def _read_mmlu(data: Path, settings: Settings) -> MmluData:
    options = settings.mmlu
    found = download_mmlu(str(data)) if options.download else read_mmlu(data)
    found.check(options.shots, options.scoring)
    return found


def _mmlu(model: Any, tokenizer: Any, rows: MmluData, settings: Settings) -> Scored:
    shots, scoring = settings.mmlu.shots, settings.mmlu.scoring
    options = {**settings.common(), "journal": settings.journal}
    return mmlu(model, tokenizer, rows, shots=shots, scoring=scoring, **options).scored()


TASKS: dict[str, TaskSpec] = {
    "perplexity": TaskSpec(lambda data, _: read_documents(data), _perplexity),
    "choices": TaskSpec(lambda data, _: read_items(data), _choices),
    "mmlu": TaskSpec(_read_mmlu, _mmlu, lambda _, rows: rows.sha256()),
    "routing": TaskSpec(
        lambda data, _: read_documents(data),
        lambda model, tokenizer, rows, settings: score_routing(
            model, tokenizer, rows, **settings.common()
        ),
    ),
}
"""Every task by its name, as in `fissile.eval.result.Task`."""
