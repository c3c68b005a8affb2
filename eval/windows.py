"""From documents to token windows: of each document for perplexity, packed for calibration.

Legend: N windows, S tokens per window.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fissile.errors import UsageError
from fissile.eval.documents import Document, by_domain
from fissile.eval.tokens import check_ids, encode, model_limits, start_token

_ENCODE_AT_ONCE = 64


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document, all predicted but the first ones.

    Args:
        ids: token ids, at least two.
        document: index of the document in the list the windows were made from.
        given: how many of the first tokens serve as context only, at least one.
    """

    ids: tuple[int, ...]
    document: int
    given: int = 1

    @property
    def predicted(self) -> int:
        """Number of predicted tokens."""
        return len(self.ids) - self.given


def document_windows(
    ids: Sequence[int], start: int, context: int, document: int = 0
) -> list[Window]:
    """Cut [start] + ids into non-overlapping windows of `context` tokens.

    A window predicts each of its tokens but the first from the tokens before it in the same
    window. Hence no token is predicted twice, the start token never, and the first token of a
    later window serves as context only: of n tokens in w windows, n + 1 - w are predicted.
    A last window of one token predicts nothing and is left out.

    Args:
        ids: tokens of one document, without special tokens.
        start: the token put before the document (BOS).
        context: tokens per window, at least 2.
        document: index kept in the windows.
    """
    whole = (start, *ids)
    cuts = (whole[i : i + context] for i in range(0, len(whole), context))
    return [Window(cut, document) for cut in cuts if len(cut) > 1]


def choose_documents(
    documents: Sequence[Document], lengths: Sequence[int], tokens: int, seed: int
) -> dict[int, int]:
    """Choose documents for a token budget that is split evenly over the domains.

    In every domain documents are taken in a seeded order until the domain's share is full; the
    last one is cut. A domain with less text than its share gives all it has.

    Args:
        documents: the candidates.
        lengths: tokens of each.
        tokens: the budget over all domains.
        seed: of the order.

    Returns:
        Index of each chosen document to the number of its tokens to use, in index order.

    Raises:
        UsageError: the budget is less than one token per domain.
    """
    domains = by_domain(documents)
    if tokens < len(domains):
        raise UsageError(f"tokens {tokens}: fewer than the {len(domains)} domains of the text")
    chosen: dict[int, int] = {}
    for place, (name, members) in enumerate(domains.items()):
        room = tokens // len(domains) + (place < tokens % len(domains))
        for index in _shuffled(members, name, seed):
            if room <= 0:
                break
            if lengths[index] > 0:
                chosen[index] = min(lengths[index], room)
                room -= chosen[index]
    return dict(sorted(chosen.items()))


def sample_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    tokens: int,
    context: int,
    seed: int = 0,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor, list[str]]:
    """Calibration windows: packed text of each domain, fixed length, no padding.

    Documents of a domain follow each other in a seeded order, each after a start token; the
    stream is cut into windows that all begin with a start token. The windows are split evenly
    over the domains (the first domains, in alphabetical order, get what is left over).

    Args:
        documents: labelled text.
        tokenizer: Hugging Face tokenizer.
        tokens: budget over all domains; tokens // context windows are made.
        context: tokens per window, at least 2.
        seed: of the documents' order.
        config: Hugging Face model configuration, for its BOS and vocabulary size, or None.

    Returns:
        ids_NS int64 (windows grouped by domain, in the order of the names), domain_N int64
        (index into the names), names of the domains in alphabetical order.

    Raises:
        UsageError: no documents, fewer windows than domains, or too little text in a domain.
        CorruptCheckpoint: the tokenizer gives ids outside the model's vocabulary.
    """
    if not documents:
        raise UsageError("the calibration text is empty: it has no documents")
    domains = by_domain(documents)
    count = tokens // context if context > 1 else 0
    if count < len(domains):
        raise UsageError(
            f"{tokens} calibration tokens make {count} windows of {context}, fewer than the"
            f" {len(domains)} domains ({', '.join(domains)}); ask for at least"
            f" {len(domains) * max(context, 2)} tokens or a shorter context"
        )
    start, vocab_size = start_token(tokenizer, config), model_limits(config)[0]
    rows: list[list[int]] = []
    labels: list[int] = []
    for place, (name, members) in enumerate(domains.items()):
        wanted = count // len(domains) + (place < count % len(domains))
        order = [documents[i] for i in _shuffled(members, name, seed)]
        packed = list(_packed(_encoded(order, tokenizer, vocab_size), start, context, wanted))
        if len(packed) < wanted:
            raise UsageError(
                f"domain {name!r}: its {len(members)} documents fill {len(packed)} windows of"
                f" {context} tokens, {wanted} are needed ({wanted * context} of the {tokens}"
                " calibration tokens); add text or lower the budget"
            )
        rows += packed
        labels += [place] * wanted
    return torch.tensor(rows), torch.tensor(labels), list(domains)


def _shuffled(members: Sequence[int], domain: str, seed: int) -> list[int]:
    # Seeded by the domain too: adding a domain leaves the choice in the others as it was.
    order = list(members)
    random.Random(f"{seed}/{domain}").shuffle(order)
    return order


def _encoded(
    documents: Sequence[Document], tokenizer: Any, vocab_size: int | None
) -> Iterator[list[int]]:
    for first in range(0, len(documents), _ENCODE_AT_ONCE):
        part = documents[first : first + _ENCODE_AT_ONCE]
        for document, ids in zip(part, encode(tokenizer, [d.text for d in part]), strict=True):
            check_ids(ids, vocab_size, document.name)
            yield ids


def _packed(
    texts: Iterator[list[int]], start: int, context: int, wanted: int
) -> Iterator[list[int]]:
    """Yield up to `wanted` windows; reads no more texts than they need."""
    window: list[int] = []
    made = 0
    for ids in texts:
        if not ids:
            continue
        for token in (start, *ids):
            if made == wanted:
                return
            if not window and token != start:
                window.append(start)
            window.append(token)
            if len(window) == context:
                yield window
                window, made = [], made + 1
