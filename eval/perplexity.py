"""Perplexity of held-out documents, total and per domain.

What a window is and which of its tokens are predicted is a convention: this project's own, below,
or one of `fissile.eval.conventions`.

Ours, exactly: a document is a start token (BOS) and its text's tokens, cut into
non-overlapping windows of `context` tokens that never reach into another document. Within a
window every token but the first is predicted from those before it. So no token is predicted twice,
the start token is not predicted, and the first token of a document's second and later windows
serves as context only. Perplexity is exp of the mean negative log-likelihood over all predicted
tokens; long documents weigh more than short ones.

Its standard error treats documents as the independent units (`uncertainty.ratio_stderr`, delta
method) and is that of the mean times the perplexity. Per byte and per word, the mean negative
log-likelihood per predicted token is multiplied by tokens per byte or word of the documents.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.documents import Document
from fissile.eval.result import Scored
from fissile.eval.scoring import token_nll
from fissile.eval.tokens import check_ids, encode, model_limits, resolve_context, start_token
from fissile.eval.uncertainty import paired_log_ratio, ratio_stderr
from fissile.eval.windows import Window, choose_documents, document_windows

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Extent:
    """How much text was tokenised.

    Args:
        tokens: without the start token.
        bytes: of UTF-8.
        words: pieces between white space, counted as lm-evaluation-harness does.
    """

    tokens: int
    bytes: int
    words: int

    @classmethod
    def of(cls, texts: Sequence[str], tokens: int) -> Extent:
        """Measure texts that were encoded to so many tokens."""
        size = sum(len(text.encode()) for text in texts)
        return cls(tokens, size, sum(len(re.split(r"\s+", text)) for text in texts))

    def __add__(self, other: Extent) -> Extent:
        return Extent(
            self.tokens + other.tokens, self.bytes + other.bytes, self.words + other.words
        )


@dataclass(frozen=True)
class DomainScore:
    """Perplexity of one domain.

    Args:
        ppl: exp of the mean negative log-likelihood.
        stderr: of ppl, over documents; None for a single document.
        n_tokens: predicted tokens.
        n_documents: documents with at least one predicted token.
        mean_nll: negative log-likelihood per predicted token, nats.
        extent: of the text.
    """

    ppl: float
    stderr: float | None
    n_tokens: int
    n_documents: int
    mean_nll: float
    extent: Extent

    def metrics(self) -> dict[str, float]:
        """Bits per byte, and perplexities per byte and per word; lower is better for all."""
        per_byte = self.mean_nll * self.extent.tokens / self.extent.bytes
        per_word = self.mean_nll * self.extent.tokens / self.extent.words
        return {
            "bits_per_byte": per_byte / math.log(2),
            "byte_perplexity": _exp(per_byte),
            "word_perplexity": _exp(per_word),
        }


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was computed from.

    Args:
        ppl: exp of the mean negative log-likelihood over all predicted tokens.
        stderr: of ppl, over documents; None for a single document.
        by_domain: the same per domain, domains in alphabetical order.
        n_tokens: predicted tokens.
        n_documents: documents with at least one predicted token.
        document_nll: total nats per document, in the order they were given.
        document_tokens: predicted tokens per document.
        document_domain: domain per document.
        document_id: the document's line in its file, else its place, per document.
        context: tokens per window.
        start: id of the token before every document, None without one.
        total: perplexity and extent of everything.
        convention: by which windows were cut.
    """

    ppl: float
    stderr: float | None
    by_domain: dict[str, DomainScore]
    n_tokens: int
    n_documents: int
    document_nll: tuple[float, ...]
    document_tokens: tuple[int, ...]
    document_domain: tuple[str | None, ...]
    document_id: tuple[str, ...]
    context: int
    start: int | None
    total: DomainScore
    convention: str = "fissile"

    def log_ratio(self, other: PerplexityResult) -> tuple[float, float | None]:
        """log(self.ppl / other.ppl) on the same documents with its paired standard error.

        Args:
            other: result on the same documents, windows and tokenizer; negative favours self.

        Raises:
            ValueError: the two were not measured on the same tokens.
        """
        if self.document_tokens != other.document_tokens or self.context != other.context:
            raise ValueError("results on different documents or windows cannot be paired")
        return paired_log_ratio(self.document_nll, other.document_nll, self.document_tokens)

    def score(self) -> dict[str, Any]:
        """The fields of a `Score` row of metrics.json."""
        return {
            "ppl": self.ppl,
            "stderr": self.stderr,
            "by_domain": {name: score.ppl for name, score in self.by_domain.items()},
            "n_tokens": self.n_tokens,
            "document_nll": [round(value, 4) for value in self.document_nll],
            "document_tokens": list(self.document_tokens),
        }

    def scored(self) -> Scored:
        """The outcome in the schema of `fissile.eval.result`."""
        by_domain = {name: score.metrics() for name, score in self.by_domain.items()}
        metrics = {
            name: {
                "value": value,
                "higher_is_better": False,
                "by_domain": {domain: found[name] for domain, found in by_domain.items()},
            }
            for name, value in self.total.metrics().items()
        }
        columns = (self.document_id, self.document_domain, self.document_nll, self.document_tokens)
        items = [
            {"id": key, "domain": domain, "nll": nll, "tokens": tokens}
            for key, domain, nll, tokens in zip(*columns, strict=True)
        ]
        details = {
            "convention": self.convention,
            "context": self.context,
            "bos": self.start,
            "n_documents": self.n_documents,
            "n_bytes": self.total.extent.bytes,
            "stderr_method": "delta method over documents",
            "domains": {
                name: {
                    "n_tokens": score.n_tokens,
                    "n_documents": score.n_documents,
                    "stderr": score.stderr,
                }
                for name, score in self.by_domain.items()
            },
        }
        groups = {name: score.ppl for name, score in self.by_domain.items()}
        return Scored(self.n_tokens, self.ppl, self.stderr, groups, details, metrics, items)


@dataclass(frozen=True)
class HeldOut:
    """Documents as windows; made once, scored under any number of models with one tokenizer.

    Args:
        windows: of all documents, in document order.
        documents: the documents the windows' indices refer to.
        context: tokens per window.
        start: id of the token before every document, None without one.
        extents: of the text of each domain.
    """

    windows: tuple[Window, ...]
    documents: tuple[Document, ...]
    context: int
    start: int | None
    extents: Mapping[str, Extent]


def prepare(
    config: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    limit: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
) -> HeldOut:
    """Encode documents and cut them into windows.

    Args:
        config: Hugging Face model configuration (start token, vocabulary size, longest context).
        tokenizer: Hugging Face tokenizer.
        documents: held-out text.
        context: tokens per window; None for the model's maximum, at most 2048.
        limit: use the first so many documents.
        tokens: use about so many tokens, split evenly over the domains (`choose_documents`).
        seed: of the choice of documents; without `tokens` nothing is random.

    Raises:
        UsageError: nothing to predict, or a context the model does not have.
        CorruptCheckpoint: the tokenizer gives ids outside the model's vocabulary.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: at least one document is needed")
    context, start = resolve_context(config, context), start_token(tokenizer, config)
    documents = list(documents[:limit])
    ids = encode(tokenizer, [d.text for d in documents])
    for document, row in zip(documents, ids, strict=True):
        check_ids(row, model_limits(config)[0], document.name)
    lengths = [len(row) for row in ids]
    chosen = dict(enumerate(lengths))
    if tokens is not None:
        chosen = choose_documents(documents, lengths, tokens, seed)
    kept = [i for i, length in chosen.items() if length > 0]
    windows = [
        window
        for place, i in enumerate(kept)
        for window in document_windows(ids[i][: chosen[i]], start, context, place)
    ]
    if not windows:
        raise UsageError(f"the text is empty: {len(documents)} documents hold no token")
    chosen_documents = [documents[i] for i in kept]
    extents = extents_by_domain(chosen_documents, [lengths[i] for i in kept])
    return HeldOut(tuple(windows), tuple(chosen_documents), context, start, extents)


def extents_by_domain(documents: Sequence[Document], lengths: Sequence[int]) -> dict[str, Extent]:
    """Extent of every domain's documents, given the tokens of each document."""
    found: dict[str, Extent] = {}
    for document, length in zip(documents, lengths, strict=True):
        own = Extent.of([document.text], length)
        found[document.domain] = found.get(document.domain, Extent(0, 0, 0)) + own
    return found


def measure(
    model: Any,
    held_out: HeldOut,
    *,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Score prepared windows under one model.

    The result does not depend on `batch_tokens` beyond rounding (about 1e-6 relative).

    Args:
        model: Hugging Face style causal model in evaluation mode.
        held_out: from `prepare`.
        batch_tokens: padded tokens per forward pass.
        progress: called with ("eval", windows done, windows, "").

    Raises:
        CorruptCheckpoint: a probability is not finite; the message names the document.
    """
    windows = held_out.windows
    nll = [0.0] * len(windows)
    for done, (index, nll_T) in enumerate(
        token_nll(model, [w.ids for w in windows], batch_tokens), start=1
    ):
        nll[index] = nll_T[windows[index].given - 1 :].double().sum().item()
        if not math.isfinite(nll[index]):
            document = held_out.documents[windows[index].document]
            raise CorruptCheckpoint(
                f"{document.name}: the model gives NaN or infinite logits on it; its weights are"
                " damaged or overflow in this dtype"
            )
        if progress is not None:
            progress("eval", done, len(windows), "")
    return _summary(held_out, nll)


def perplexity(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    batch_tokens: int = 8192,
    limit: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a model on documents by this project's convention: `prepare` and `measure`.

    Args:
        model: Hugging Face style causal model in evaluation mode.
        tokenizer: its tokenizer.
        documents: held-out text.
        context: tokens per window; None for the model's maximum, at most 2048.
        batch_tokens: padded tokens per forward pass; does not change the result.
        limit: use the first so many documents.
        tokens: use about so many tokens, split evenly over the domains.
        seed: of the choice of documents under `tokens`.
        progress: called with ("eval", windows done, windows, "").

    Raises:
        UsageError: nothing to predict, or a context the model does not have.
        CorruptCheckpoint: ids outside the vocabulary, or logits that are not finite.
    """
    held_out = prepare(
        model.config, tokenizer, documents, context=context, limit=limit, tokens=tokens, seed=seed
    )
    return measure(model, held_out, batch_tokens=batch_tokens, progress=progress)


def _summary(held_out: HeldOut, window_nll: Sequence[float]) -> PerplexityResult:
    nll = [0.0] * len(held_out.documents)
    counts = [0] * len(held_out.documents)
    for window, value in zip(held_out.windows, window_nll, strict=True):
        nll[window.document] += value
        counts[window.document] += window.predicted
    domains = tuple(d.domain for d in held_out.documents)
    scores = {
        name: _score(
            [v for v, d in zip(nll, domains, strict=True) if d == name],
            [c for c, d in zip(counts, domains, strict=True) if d == name],
            held_out.extents[name],
        )
        for name in sorted(set(domains))
    }
    total = _score(nll, counts, sum(held_out.extents.values(), Extent(0, 0, 0)))
    return PerplexityResult(
        total.ppl,
        total.stderr,
        scores,
        total.n_tokens,
        total.n_documents,
        tuple(nll),
        tuple(counts),
        domains,
        tuple(str(d.line or place) for place, d in enumerate(held_out.documents, start=1)),
        held_out.context,
        held_out.start,
        total,
    )


def _score(nll: Sequence[float], counts: Sequence[int], extent: Extent) -> DomainScore:
    n_tokens = sum(counts)
    mean, error = math.fsum(nll) / n_tokens, ratio_stderr(nll, counts)
    stderr = None if error is None else _exp(mean) * error
    return DomainScore(_exp(mean), stderr, n_tokens, sum(c > 0 for c in counts), mean, extent)


def _exp(value: float) -> float:
    # A broken model may exceed what exp can hold; infinity is then the honest value.
    return math.exp(value) if value < 700 else math.inf
