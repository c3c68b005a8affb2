"""Multiple choice by the length-normalised log-likelihood of each choice after the question.

An item is {"question": str, "choices": [str, …], "answer": index, "subject"?: str}. A choice
follows the question after one space, unless one of the two brings white space of its own. White
space at the question's end belongs to the choice (" Paris" is one token, "Paris" another), the
question and question + choice are encoded as wholes, and the tokens after the question's count as
the choice's: the convention of lm-evaluation-harness. The score is their mean log-likelihood; the
highest wins. Choices that tie for the highest share the credit. Equal choices tie exactly.

Legend: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.documents import read_rows
from fissile.eval.scoring import token_nll
from fissile.eval.tokens import check_ids, encode, model_limits, resolve_context, start_token
from fissile.eval.uncertainty import mean_stderr

NO_SUBJECT = "all"
TEMPLATE = "{question} {choice}"
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        question: text before the choices.
        choices: at least two non-empty texts.
        answer: index of the right one.
        subject: label; items without one share the subject "all".
        line: line of the file, from 1; 0 if it came from elsewhere.
        document: what it was cut from; items of one document are not independent.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str = NO_SUBJECT
    line: int = 0
    document: str | None = None


@dataclass(frozen=True)
class ChoicesResult:
    """Accuracy and what it was computed from.

    Args:
        accuracy: mean credit.
        stderr: of the mean over items; None for a single item.
        by_subject: accuracy per subject, in alphabetical order.
        n_items: items scored.
        n_ties: items whose highest score was shared.
        credit: per item, 1 right, 0 wrong, 1/m when m choices tied and the answer was among them.
        scores: per item and choice, mean log-likelihood per token, nats.
        context: most tokens of question and choice.
        start: id of the token before every question.
    """

    accuracy: float
    stderr: float | None
    by_subject: dict[str, float]
    n_items: int
    n_ties: int
    credit: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]
    context: int
    start: int


def read_items(path: Path) -> list[Item]:
    """Read multiple-choice items from JSONL; rows of split "dev" are examples and left out.

    Args:
        path: the file.

    Raises:
        UsageError: unreadable file, a missing or wrong field, an empty file; names file and line.
    """
    items = [
        _item(f"{path}:{number}", number, row)
        for number, row in read_rows(path)
        if row.get("split") != "dev"
    ]
    if not items:
        raise UsageError(f"{path}: no items; expected question, choices and answer on each line")
    return items


def choices(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    context: int | None = None,
    batch_tokens: int = 8192,
    limit: int | None = None,
    progress: Progress | None = None,
) -> ChoicesResult:
    """Score multiple-choice items.

    Args:
        model: Hugging Face style causal model in evaluation mode.
        tokenizer: its tokenizer.
        items: the questions.
        context: most tokens of question and choice; longer questions lose their beginning.
            None for the model's maximum, at most 2048.
        batch_tokens: padded tokens per forward pass; changes scores by rounding only.
        limit: use the first so many items.
        progress: called with ("eval", sequences done, sequences, "").

    Raises:
        UsageError: no items, or a choice longer than the context.
        CorruptCheckpoint: ids outside the vocabulary, or logits that are not finite.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: at least one item is needed")
    items = list(items[:limit])
    if not items:
        raise UsageError("there are no items to score")
    context, start = resolve_context(model.config, context), start_token(tokenizer, model.config)
    vocab_size = model_limits(model.config)[0]
    requests = [_requests(item, tokenizer, start, context, vocab_size) for item in items]
    # Each distinct sequence is scored once, so equal choices tie exactly in every batch.
    tails: dict[tuple[int, ...], int] = {}
    for ids, count in (request for row in requests for request in row):
        tails[ids] = max(count, tails.get(ids, 1))
    unique = list(tails)
    owner = {ids: item for item, row in zip(items, requests, strict=True) for ids, _ in row}
    nll: dict[tuple[int, ...], list[float]] = {}
    scored = token_nll(model, unique, batch_tokens, list(tails.values()))
    for done, (index, nll_T) in enumerate(scored, start=1):
        nll[unique[index]] = nll_T.double().tolist()
        if not math.isfinite(sum(nll[unique[index]])):
            raise CorruptCheckpoint(
                f"{_name(owner[unique[index]])}: the model gives NaN or infinite logits on it"
            )
        if progress is not None:
            progress("eval", done, len(unique), "")
    scores = [tuple(-math.fsum(nll[ids][-n:]) / n for ids, n in row) for row in requests]
    return _summary(items, scores, context, start)


def _requests(
    item: Item, tokenizer: Any, start: int, context: int, vocab_size: int | None
) -> list[tuple[tuple[int, ...], int]]:
    """For each choice (ids of start, question and choice; number of the choice's tokens)."""
    question = item.question.rstrip()
    space = item.question[len(question) :]
    wholes = [
        question + (space or ("" if choice[0].isspace() else " ")) + choice
        for choice in item.choices
    ]
    prefix, *encoded = encode(tokenizer, [question, *wholes])
    requests = []
    for number, ids in enumerate(encoded):
        check_ids(ids, vocab_size, _name(item))
        # A merge across the border may leave no token of its own; the last one then stands for it.
        count = max(1, len(ids) - len(prefix))
        if count > context - 1:
            raise UsageError(
                f"{_name(item)}: choice {number} has {count} tokens, the context holds {context}"
            )
        requests.append(((start, *ids[-(context - 1) :]), count))
    return requests


def _summary(
    items: Sequence[Item], scores: Sequence[tuple[float, ...]], context: int, start: int
) -> ChoicesResult:
    credit, ties = [], 0
    for item, row in zip(items, scores, strict=True):
        best = [i for i, value in enumerate(row) if value == max(row)]
        ties += len(best) > 1
        credit.append(1 / len(best) if item.answer in best else 0.0)
    by_subject = {}
    for name in sorted({item.subject for item in items}):
        part = [c for c, item in zip(credit, items, strict=True) if item.subject == name]
        by_subject[name] = math.fsum(part) / len(part)
    return ChoicesResult(
        math.fsum(credit) / len(credit),
        mean_stderr(credit),
        by_subject,
        len(items),
        ties,
        tuple(credit),
        tuple(scores),
        context,
        start,
    )


def _name(item: Item) -> str:
    return f"item at line {item.line}" if item.line else f"item {item.question[:24]!r}…"


def _item(where: str, line: int, row: dict[str, Any]) -> Item:
    question, answer, subject = row.get("question"), row.get("answer"), row.get("subject")
    options = row.get("choices")
    if not (isinstance(question, str) and question.strip()):
        raise UsageError(f'{where}: field "question" must be a non-empty string')
    if not isinstance(options, list):
        options = []
    if len(options) < 2 or not all(isinstance(c, str) and c.strip() for c in options):
        raise UsageError(f'{where}: field "choices" must list at least two non-empty strings')
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(options):
        raise UsageError(
            f'{where}: field "answer" must be an index from 0 to {len(options) - 1},'
            f" found {answer!r}"
        )
    if subject is not None and not isinstance(subject, str):
        raise UsageError(f'{where}: field "subject" must be a string, found {subject!r}')
    document = row.get("document")
    own = None if document is None else str(document)
    return Item(question, tuple(options), answer, subject or NO_SUBJECT, line, own)
