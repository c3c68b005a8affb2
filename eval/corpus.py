"""Labelled text from what every installation has, split by file into calibration and held-out.

Nothing is downloaded or redistributed: the text is read from the Python standard library, C and C++
headers, the language reference and package descriptions, and API documentation in docstrings.

A file belongs to one split by a hash of its relative path, so another installation with the same
files makes the same corpus. A paragraph that was seen before anywhere in the corpus (licences,
shared sections of the language reference) is removed, so no text is on both sides.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Literal, get_args

from fissile.errors import UsageError
from fissile.eval.continuations import build_choices
from fissile.eval.documents import rows_to_bytes
from fissile.eval.sources import DOMAINS, Source
from fissile.io.publish import atomic_write_bytes

Split = Literal["calibration", "heldout"]

_BYTES: dict[Split, int] = {"calibration": 480_000, "heldout": 160_000}
_LEAST_BYTES: dict[Split, int] = {"calibration": 200_000, "heldout": 60_000}
# Held-out documents are short, so that a token budget holds many: they are the sampling units.
_DOCUMENT_BYTES: dict[Split, int] = {"calibration": 12_000, "heldout": 5_000}
_LEAST_DOCUMENT_BYTES = 800
_HELD_OUT_SHARE = 0.3
_LONGEST_FILE = 400_000
_PARAGRAPH_LETTERS = 40


@dataclass(frozen=True)
class Corpus:
    """What `build_corpus` wrote.

    Args:
        calibration: path of calibration.jsonl.
        heldout: path of heldout.jsonl.
        choices: path of choices.jsonl, multiple-choice items made of the held-out text.
        documents: documents per split and domain.
        size: UTF-8 bytes of text per split and domain.
    """

    calibration: Path
    heldout: Path
    choices: Path
    documents: dict[str, dict[str, int]]
    size: dict[str, dict[str, int]]


@dataclass
class _Domain:
    """Documents of one domain while they are collected."""

    name: str
    texts: dict[Split, list[tuple[str, str]]] = field(
        default_factory=lambda: {split: [] for split in get_args(Split)}
    )
    size: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(get_args(Split), 0))

    @property
    def full(self) -> bool:
        return all(self.size[split] >= _BYTES[split] for split in get_args(Split))


def split_of(domain: str, key: str) -> Split:
    """The split of a file.

    Args:
        domain: its domain.
        key: its path relative to the root it was found under, with forward slashes.
    """
    share = int(_digest(f"{domain}/{key}")[:8], 16) / 2**32
    return "heldout" if share < _HELD_OUT_SHARE else "calibration"


def build_corpus(out: Path) -> Corpus:
    """Write calibration.jsonl and heldout.jsonl, rows {"text", "domain", "source"}.

    The rows take turns over the domains, so that the first rows hold every domain. `source` is the
    file's relative path. The same installation gives the same bytes.

    Args:
        out: folder for the two files; made if absent, files of these names are replaced.

    Raises:
        UsageError: a domain has too little text in this installation; says how much is needed.
    """
    seen: set[str] = set()
    domains = [_collect(name, source, seen) for name, source in DOMAINS.items()]
    for domain in domains:
        for split, least in _LEAST_BYTES.items():
            if domain.size[split] < least:
                raise UsageError(
                    f"corpus: domain {domain.name!r} has {domain.size[split]} bytes of {split}"
                    f" text in this installation, {least} are needed; give your own text instead"
                )
    out.mkdir(parents=True, exist_ok=True)
    paths: dict[Split, Path] = {split: out / f"{split}.jsonl" for split in get_args(Split)}
    for split, path in paths.items():
        atomic_write_bytes(path, rows_to_bytes(_rows(domains, split)))
    return Corpus(
        paths["calibration"],
        paths["heldout"],
        build_choices(paths["heldout"], out / "choices.jsonl"),
        {s: {d.name: len(d.texts[s]) for d in domains} for s in get_args(Split)},
        {s: {d.name: d.size[s] for d in domains} for s in get_args(Split)},
    )


def _collect(name: str, source: Source, seen: set[str]) -> _Domain:
    domain = _Domain(name)
    # Hash order mixes packages and folders; the caps then cut no part of the alphabet off.
    for item in sorted(source(), key=lambda item: _digest(f"{name}/{item.key}")):
        split = split_of(name, item.key)
        if domain.full:
            break
        if domain.size[split] >= _BYTES[split]:
            continue
        raw = item.read()
        if raw is None or len(raw) > _LONGEST_FILE:
            continue
        text = _cut(_without_repeats(raw, seen), _DOCUMENT_BYTES[split])
        if text is None or not _is_prose_or_code(text):
            continue
        domain.texts[split].append((item.key, text))
        domain.size[split] += len(text.encode())
    return domain


def _without_repeats(text: str, seen: set[str]) -> str:
    """Drop paragraphs whose letters were seen before; short ones ("else:", "return x") stay."""
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
        letters = re.sub(r"[\W\d_]+", "", paragraph)
        if len(letters) >= _PARAGRAPH_LETTERS:
            key = _digest(letters)
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph.rstrip())
    return "\n\n".join(kept).strip("\n") + "\n"


def _cut(text: str, most: int) -> str | None:
    """The first whole lines of up to `most` bytes, or None if that leaves too little."""
    raw = text.encode()
    if len(raw) > most:
        text = raw[:most].decode(errors="ignore")
        text = text[: text.rfind("\n") + 1]
    return text if len(text.encode()) >= _LEAST_DOCUMENT_BYTES else None


def _is_prose_or_code(text: str) -> bool:
    """Refuse minified files, tables of numbers and long lists of symbols."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or max(map(len, lines)) > 1000:
        return False
    solid = re.sub(r"\s", "", text)
    letters = sum(c.isalpha() for c in solid) / len(solid)
    words = re.findall(r"[^\W\d_]{2,}", text)
    return letters > 0.55 and len(set(words)) > 0.1 * len(words)


def _rows(domains: Iterable[_Domain], split: Split) -> Iterator[dict[str, str]]:
    columns = [
        [{"text": text, "domain": d.name, "source": key} for key, text in d.texts[split]]
        for d in domains
    ]
    return (row for row in chain.from_iterable(zip_longest(*columns)) if row is not None)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
