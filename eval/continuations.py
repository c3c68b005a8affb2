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

_QUESTION_CHARS = 240
_CHOICE_CHARS = 80
_LEAST_QUESTION = 200


def build_choices(
    heldout: Path,
    out: Path,
    *,
    items_per_domain: int = 25,
    shots: int = 5,
    seed: int = 0,
    num_choices: int = 4,
) -> Path:
    """Write multiple-choice items made from a JSONL file of documents.

    An item is {"question": what comes before a line start, "choices": the text that follows it and
    distractors, "answer": index, "subject": domain, "split": "test" or "dev", "document": line}.
    The rows of split "dev" are the examples that `--task mmlu` puts before its questions; they are
    cut from other documents than the test's, and `--task choices` leaves them out. The same file
    and seed give the same bytes.

    Args:
        heldout: JSONL of documents.
        out: JSONL to write; replaced if it exists.
        items_per_domain: test items for each domain.
        shots: dev items for each domain.
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
        rows += _domain_items(domain, texts, rng, (items_per_domain, shots), num_choices)
    random.Random(seed).shuffle(rows)
    atomic_write_bytes(out, rows_to_bytes(rows))
    return out


def _domain_items(
    domain: str,
    documents: Sequence[Document],
    rng: random.Random,
    counts: tuple[int, int],
    num_choices: int,
) -> list[dict[str, object]]:
    """Items of one domain; `counts` are those of the test and of the dev split."""
    cuts = {i: _cuts(document.text) for i, document in enumerate(documents)}
    usable = [i for i, places in cuts.items() if places]
    rng.shuffle(usable)
    shots = counts[1]
    if len(usable) < num_choices + shots:
        raise UsageError(
            f"choices: domain {domain!r} has {len(usable)} documents of more than"
            f" {_LEAST_QUESTION + _CHOICE_CHARS} characters, {num_choices + shots} are needed"
            f" ({shots} of them for examples, --shots)"
        )
    owners = [(usable[:shots], "dev")] * shots + [(usable[shots:], "test")] * counts[0]
    free = {i: rng.sample(cuts[i], len(cuts[i])) for i in usable}
    rows: list[dict[str, object]] = []
    for members, split in owners:
        left = [i for i in members if free[i]]
        if not left:
            raise UsageError(
                f"choices: domain {domain!r} has text for {len(rows) - shots} items,"
                f" {counts[0]} are asked for"
            )
        # The document that gave the fewest items so far is next: they are the sampling units.
        own = max(left, key=lambda i: (-_used(cuts[i], free[i]), rng.random()))
        place = free[own].pop()
        others = rng.sample([i for i in usable if i != own], num_choices - 1)
        choices = [_continuation(documents[own].text, place)]
        choices += [_continuation(documents[i].text, rng.choice(cuts[i])) for i in others]
        order = rng.sample(range(num_choices), num_choices)
        rows.append(
            {
                "question": documents[own].text[max(0, place - _QUESTION_CHARS) : place],
                "choices": [choices[i] for i in order],
                "answer": order.index(0),
                "subject": domain,
                "split": split,
                "document": documents[own].line,
            }
        )
    return rows


def _used(places: Sequence[int], free: Sequence[int]) -> int:
    return len(places) - len(free)


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
