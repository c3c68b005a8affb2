"""A small multiple-choice set from labelled text: the true continuation among three others.

Three wrong choices are cut from other documents of the same domain at line starts too, to about the
same length, so that neither domain nor length gives the answer away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from fissile.errors import UsageError
from fissile.eval.documents import Document, by_domain, read_documents, rows_to_bytes
from fissile.io.publish import atomic_write_bytes

_QUESTION_CHARS = 400
_CHOICE_CHARS = 120
_LEAST_QUESTION = 200


def build_choices(
    heldout: Path, out: Path, *, items_per_domain: int = 25, seed: int = 0, num_choices: int = 4
) -> Path:
    """Write multiple-choice items made from a JSONL file of documents.

    An item is {"question": what comes before a line start, "choices": the text that follows it and
    distractors, "answer": index, "subject": domain}. The same file and seed give the same bytes.

    Args:
        heldout: JSONL of documents.
        out: JSONL to write; replaced if it exists.
        items_per_domain: items for each domain.
        seed: of places, distractors and order.
        num_choices: choices per item, at least 2.

    Returns:
        `out`.

    Raises:
        UsageError: unreadable documents, or a domain with too few documents that are long enough.
    """
    documents = read_documents(heldout)
    rows = []
    for domain, members in by_domain(documents).items():
        rng = random.Random(f"{seed}/{domain}")
        texts = [documents[i] for i in members]
        rows += _domain_items(domain, texts, rng, items_per_domain, num_choices)
    random.Random(seed).shuffle(rows)
    atomic_write_bytes(out, rows_to_bytes(rows))
    return out


def _domain_items(
    domain: str, documents: Sequence[Document], rng: random.Random, items: int, num_choices: int
) -> list[dict[str, object]]:
    cuts = {i: _cuts(document.text) for i, document in enumerate(documents)}
    usable = [i for i, places in cuts.items() if places]
    if len(usable) < num_choices:
        raise UsageError(
            f"choices: domain {domain!r} has {len(usable)} documents of more than"
            f" {_LEAST_QUESTION + _CHOICE_CHARS} characters, {num_choices} are needed"
        )
    rows: list[dict[str, object]] = []
    while len(rows) < items:
        own, *others = rng.sample(usable, num_choices)
        place = rng.choice(cuts[own])
        text = documents[own].text
        choices = [_continuation(text, place)]
        choices += [_continuation(documents[i].text, rng.choice(cuts[i])) for i in others]
        order = rng.sample(range(num_choices), num_choices)
        rows.append(
            {
                "question": text[max(0, place - _QUESTION_CHARS) : place],
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
                "subject": domain,
            }
        )
    return rows


def _cuts(text: str) -> list[int]:
    """Line starts with enough text before and after, where the next line is not blank."""
    starts = [match.end() for match in re.finditer(r"\n(?=[ \t]*\S)", text)]
    return [s for s in starts if s >= _LEAST_QUESTION and len(text) - s >= _CHOICE_CHARS]


def _continuation(text: str, place: int) -> str:
    """About _CHOICE_CHARS characters from `place`, ending with a whole word."""
    cut = text[place : place + _CHOICE_CHARS]
    end = max(cut.rfind(" "), cut.rfind("\n"))
    whole = cut[:end].rstrip() if end > _CHOICE_CHARS // 2 else cut
    return whole if whole.strip() else cut
