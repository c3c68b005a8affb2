"""MMLU with the scores of lm-evaluation-harness, item by item.

The choice is the continuation of the highest total log-likelihood, the first one of those that tie
(prompts: `fissile.eval.mmlu_prompts`, their tokens: `fissile.eval.mmlu_encode`).

The description and the examples of a subject are run once; see `fissile.eval.prefix`. Where the two
best choices are closer than rounding, the item is scored again by itself and without sharing, so
that the choice is the same for every batch size on every device.

Averages are the harness's: a group is weighted by size, its standard error is pooled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.mmlu_data import MmluData
from fissile.eval.mmlu_encode import EncodedItem, Encoder
from fissile.eval.mmlu_journal import Journal
from fissile.eval.mmlu_prompts import (
    GROUPS,
    HARNESS_VERSIONS,
    SUBJECTS,
    MmluItem,
    Scoring,
    prefix_text,
    template_sha256,
)
from fissile.eval.perplexity import Progress
from fissile.eval.prefix import PrefixScorer, Row
from fissile.eval.result import Scored
from fissile.eval.uncertainty import mean_stderr, pooled_stderr

DEFAULT_SHOTS = 5
# Differences of this share of the value are rounding.
_CLOSE = 1e-5
# Tokens of prefixes cached at a time, as a share of the tokens of a forward pass.
_CACHED_SHARE = 8

_Choice = tuple[tuple[int, ...], tuple[int, ...]]
"""Input and continuation."""


@dataclass(frozen=True)
class MmluOptions:
    """What this task takes beside what all take.

    Args:
        shots: examples before every question.
        scoring: "letter" or "continuation".
        download: the data are a data set of the hub, to be fetched.
        out: file that the result will be written to; finished subjects are kept beside it.
        resume: take the subjects that an earlier call with this `out` finished.
    """

    shots: int = DEFAULT_SHOTS
    scoring: Scoring = "letter"
    download: bool = False
    out: Path | None = None
    resume: bool = False


def open_journal(
    options: MmluOptions, bits: int | None, context: int | None, conditions: Mapping[str, Any]
) -> Journal | None:
    """The journal of an evaluation, or None if its result is not written to a file.

    Args:
        options: of the task.
        bits: width that is served.
        context: most tokens of an input, as asked.
        conditions: of the result, as far as they are known before it.

    Raises:
        UsageError: an earlier evaluation of other conditions is to be resumed.
    """
    if options.out is None:
        return None
    # A batch's size changes nothing.
    identity = {key: value for key, value in conditions.items() if key != "batch_tokens"}
    identity |= {"bits": bits, "context": context}
    identity |= {"shots": options.shots, "scoring": options.scoring}
    return Journal(options.out, identity, resume=options.resume)


@dataclass(frozen=True)
class MmluResult:
    """Outcomes and what they depend on.

    Args:
        outcomes: subject to its items' {id, subject, correct, choice, answer, loglikelihoods}.
        details: conditions of the run.
    """

    outcomes: Mapping[str, Sequence[Mapping[str, Any]]]
    details: Mapping[str, Any]

    def scored(self) -> Scored:
        """The outcome in the schema of `fissile.eval.result`."""
        correct = {s: [float(o["correct"]) for o in found] for s, found in self.outcomes.items()}
        scores = {s: sum(values) / len(values) for s, values in correct.items()}
        errors = {s: mean_stderr(values) for s, values in correct.items()}
        sizes = {s: len(values) for s, values in correct.items()}
        metrics: dict[str, Any] = {
            "macro_accuracy": {
                "value": sum(scores.values()) / len(scores),
                "higher_is_better": True,
                "stderr": _macro_stderr(list(errors.values())),
            }
        }
        for group, members in GROUPS.items():
            own = [s for s in members if s in scores]
            if own:
                value, stderr = _pooled(own, scores, errors, sizes)
                metrics[f"accuracy ({group})"] = {
                    "value": value,
                    "higher_is_better": True,
                    "stderr": stderr,
                    "n_items": sum(sizes[s] for s in own),
                }
        value, stderr = _pooled(list(scores), scores, errors, sizes)
        subjects = {
            s: {"n_items": sizes[s], "stderr": errors[s], "group": SUBJECTS.get(s)} for s in scores
        }
        items = [item for found in self.outcomes.values() for item in found]
        details = {**self.details, "subjects": subjects}
        return Scored(sum(sizes.values()), value, stderr, scores, details, metrics, items)


def mmlu(
    model: Any,
    tokenizer: Any,
    data: MmluData,
    *,
    shots: int = DEFAULT_SHOTS,
    scoring: Scoring = "letter",
    context: int | None = None,
    batch_tokens: int = 8192,
    limit: int | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> MmluResult:
    """Score a model on MMLU.

    Args:
        model: Hugging Face style causal model in evaluation mode.
        tokenizer: its tokenizer.
        data: questions and examples.
        shots: examples before every question, 0 to 5.
        scoring: "letter" (the harness's task mmlu) or "continuation" (mmlu_continuation).
        context: most tokens of an input; None for the model's maximum, as the harness finds it.
        batch_tokens: padded tokens per forward pass; does not change the result.
        limit: first so many questions of every subject, as the harness counts.
        journal: keeps finished subjects; those that it holds are not scored again.
        progress: called with ("eval", questions done, questions, subject).

    Raises:
        UsageError: too few examples, a limit below 1, a continuation that has no token of its own
            or more than the context.
        CorruptCheckpoint: ids outside the vocabulary, or values that are not finite.
    """
    data.check(shots, scoring)
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: at least one question is needed")
    encoder = Encoder(tokenizer, model.config, scoring, context)
    scorer = PrefixScorer(model, batch_tokens, encoder.longest)
    todo = {subject: items[:limit] for subject, items in data.test.items()}
    records = {s: journal.load(s) if journal is not None else None for s in todo}
    found = {s: record for s, record in records.items() if record is not None}
    steps = _Steps(progress, sum(map(len, todo.values())))
    for subject in found:
        steps.finished(subject, len(todo[subject]))
    texts = {
        s: prefix_text(s, data.dev.get(s, [])[:shots], scoring) for s in todo if s not in found
    }
    prefixes = {s: encoder.prefix(text) for s, text in texts.items()}
    for group in _together(prefixes, batch_tokens // _CACHED_SHARE):
        encoded = {s: encoder.items(todo[s], texts[s]) for s in group}
        values = _values(scorer, encoded, prefixes, steps)
        for subject in group:
            found[subject] = _subject(scorer, todo[subject], encoded[subject], values)
            if journal is not None:
                journal.save(subject, found[subject])
            steps.finished(subject, len(todo[subject]))
    found = {subject: found[subject] for subject in todo}
    details = {"shots": shots, **_details(encoder, list(found.values()))}
    return MmluResult({s: record["items"] for s, record in found.items()}, details)


def _details(encoder: Encoder, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "scoring": encoder.scoring,
        "harness_version": HARNESS_VERSIONS,
        "template_sha256": template_sha256(encoder.scoring),
        "normalisation": "total log-likelihood",
        "stderr_method": "pooled over subjects",
        "bos": encoder.start,
        "context": encoder.longest,
        "n_truncated": sum(record["n_truncated"] for record in records),
        "n_close": sum(record["n_close"] for record in records),
    }


class _Steps:
    """Turns finished rows of some subjects into finished questions."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def rows(self, subjects: Sequence[str], items: int, rows: int, of: int) -> None:
        """So many rows of the questions of these subjects are scored."""
        if self.progress is not None and rows < of:
            others = f" and {len(subjects) - 1} more" if len(subjects) > 1 else ""
            done = self.done + rows * items // of
            self.progress("eval", done, self.total, subjects[0] + others)

    def finished(self, subject: str, items: int) -> None:
        """A subject is complete."""
        self.done += items
        if self.progress is not None:
            self.progress("eval", self.done, self.total, subject)


def _together(prefixes: Mapping[str, tuple[int, ...]], most_tokens: int) -> Iterator[list[str]]:
    """Subjects whose prefixes are of one length and have no more tokens than these."""
    by_size: dict[int, list[str]] = {}
    for subject, prefix in prefixes.items():
        by_size.setdefault(len(prefix), []).append(subject)
    for size, subjects in by_size.items():
        count = max(1, most_tokens // max(1, size))
        yield from (subjects[i : i + count] for i in range(0, len(subjects), count))


def _values(
    scorer: PrefixScorer,
    encoded: Mapping[str, Sequence[EncodedItem]],
    prefixes: Mapping[str, tuple[int, ...]],
    steps: _Steps,
) -> dict[_Choice, float]:
    """Log-likelihoods of all choices of some subjects."""
    # Choices with the same input (the four letters; equal questions) are one row.
    continuations: dict[tuple[tuple[int, ...], int], dict[tuple[int, ...], None]] = {}
    shared: dict[tuple[int, ...], int] = {}
    for subject, items in encoded.items():
        prefix = prefixes[subject]
        for ids, own in (choice for item in items for choice in item.choices):
            continuations.setdefault((ids, len(own)), {})[own] = None
            shared[ids] = len(prefix) if ids[: len(prefix)] == prefix else 0
    rows = [Row(ids, tuple(own), shared[ids]) for (ids, _), own in continuations.items()]
    values: dict[_Choice, float] = {}
    subjects, count = list(encoded), sum(map(len, encoded.values()))
    for done, (index, numbers) in enumerate(scorer.loglikelihoods(rows), start=1):
        row = rows[index]
        values |= {(row.ids, own): v for own, v in zip(row.continuations, numbers, strict=True)}
        steps.rows(subjects, count, done, len(rows))
    return values


def _subject(
    scorer: PrefixScorer,
    items: Sequence[MmluItem],
    encoded: Sequence[EncodedItem],
    values: Mapping[_Choice, float],
) -> dict[str, Any]:
    """Outcomes of a subject's items and counts, as JSON holds them."""
    outcomes, close = [], 0
    for number, (item, rest) in enumerate(zip(items, encoded, strict=True), start=1):
        numbers = [values[choice] for choice in rest.choices]
        if not all(map(math.isfinite, numbers)):
            raise CorruptCheckpoint(f"{item.where}: the model gives NaN or infinite logits on it")
        if _is_close(numbers):
            numbers, close = _alone(scorer, rest), close + 1
        choice = numbers.index(max(numbers))
        outcomes.append(
            {
                "id": f"{item.subject}/{number}",
                "subject": item.subject,
                "correct": float(choice == item.answer),
                "choice": choice,
                "answer": item.answer,
                "loglikelihoods": numbers,
            }
        )
    truncated = sum(item.truncated for item in encoded)
    return {"items": outcomes, "n_truncated": truncated, "n_close": close}


def _is_close(numbers: Sequence[float]) -> bool:
    """Whether the best two differ, but by no more than rounding may."""
    best = max(numbers)
    rest = [value for value in numbers if value != best]
    return bool(rest) and best - max(rest) <= _CLOSE * (1 + abs(best))


def _alone(scorer: PrefixScorer, item: EncodedItem) -> list[float]:
    """Score each input of an item by itself, from its first token."""
    own: dict[_Choice, float] = {}
    for ids, continuation in dict.fromkeys(item.choices):
        _, (own[ids, continuation],) = next(scorer.loglikelihoods([Row(ids, (continuation,))]))
    return [own[choice] for choice in item.choices]


def _pooled(
    subjects: Sequence[str],
    scores: Mapping[str, float],
    errors: Mapping[str, float | None],
    sizes: Mapping[str, int],
) -> tuple[float, float | None]:
    """Average weighted by size and its standard error."""
    counts = [sizes[s] for s in subjects]
    value = sum(scores[s] * sizes[s] for s in subjects) / sum(counts)
    return value, pooled_stderr([errors[s] for s in subjects], counts)


def _macro_stderr(errors: Sequence[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):
        return None
    return math.sqrt(sum(error**2 for error in known)) / len(known)
