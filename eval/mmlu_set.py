"""A set in MMLU's layout made of labelled text, for machines without the data and for tests.

A question quotes the end of a passage and asks what follows; the wrong choices are cut from other
passages of the same domain to about the same length. The subjects' names are the standard 57; what
is asked in each is the same. Questions are short, so that five examples fit a context of 512.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from fissile.errors import UsageError
from fissile.eval.documents import Document, by_domain, read_documents, rows_to_bytes
from fissile.eval.mmlu_data import MAX_SHOTS
from fissile.eval.mmlu_prompts import SUBJECTS
from fissile.io.publish import atomic_write_bytes

_QUESTION_CHARS, _CHOICE_CHARS = (30, 80), (6, 24)
_CHOICES = 4


def build_mmlu(
    documents: Path, out: Path, *, per_subject: int = 36, shots: int = MAX_SHOTS, seed: int = 0
) -> Path:
    """Write test.jsonl and dev.jsonl, rows {"question", "choices", "answer", "subject"}.

    Args:
        documents: JSONL of labelled text.
        out: folder; made if absent, files of these names are replaced.
        per_subject: questions per subject.
        shots: examples per subject.
        seed: of everything drawn; the same file and seed give the same bytes.

    Returns:
        `out`.

    Raises:
        UsageError: unreadable documents, or a domain with fewer than four passages.
    """
    found = read_documents(documents)
    passages = {
        domain: [_passage(found[i]) for i in members]
        for domain, members in by_domain(found).items()
    }
    passages = {
        d: [p for p in own if len(p) > 4 * _QUESTION_CHARS[1]] for d, own in passages.items()
    }
    for domain, own in passages.items():
        if len(own) < _CHOICES:
            raise UsageError(
                f"{documents}: domain {domain!r} has {len(own)} passages long enough, {_CHOICES}"
                " are needed"
            )
    out.mkdir(parents=True, exist_ok=True)
    for split, count in (("test", per_subject), ("dev", shots)):
        rows = []
        for place, subject in enumerate(SUBJECTS):
            rng = random.Random(f"{seed}/{split}/{subject}")
            own = passages[sorted(passages)[place % len(passages)]]
            rows += [{**_item(own, rng), "subject": subject} for _ in range(count)]
        atomic_write_bytes(out / f"{split}.jsonl", rows_to_bytes(rows))
    return out


def _passage(document: Document) -> str:
    return re.sub(r"\s+", " ", document.text).strip()


def _item(passages: Sequence[str], rng: random.Random) -> dict[str, object]:
    own, *others = rng.sample(range(len(passages)), _CHOICES)
    size = rng.randint(*_CHOICE_CHARS)
    cut = _word_start(passages[own], rng)
    begin = max(0, cut - rng.randint(*_QUESTION_CHARS))
    choices = [_words(passages[own], cut, size)]
    choices += [_words(passages[i], _word_start(passages[i], rng), size) for i in others]
    order = rng.sample(range(_CHOICES), _CHOICES)
    return {
        "question": f"What follows? {passages[own][begin:cut].strip()}",
        "choices": [choices[i] for i in order],
        "answer": order.index(0),
    }


def _word_start(text: str, rng: random.Random) -> int:
    """A place after a space, with enough text on both sides."""
    place = rng.randrange(_QUESTION_CHARS[1], len(text) - 2 * _QUESTION_CHARS[1])
    return text.index(" ", place) + 1 if " " in text[place : place + _QUESTION_CHARS[1]] else place


def _words(text: str, begin: int, size: int) -> str:
    """About `size` characters from `begin`, ending with a whole word where one ends there."""
    cut = text[begin : begin + size]
    return cut.rsplit(" ", 1)[0] or cut
