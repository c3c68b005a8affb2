"""Documents: the JSONL files that calibration and evaluation read. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fissile.errors import UsageError

UNLABELLED = "text"


@dataclass(frozen=True)
class Document:
    """One text and the domain it is counted under.

    Args:
        text: at least one character that is not white space.
        domain: label; documents without one share the domain "text".
        line: line of the file it was read from, counted from 1; 0 if it came from elsewhere.
    """

    text: str
    domain: str = UNLABELLED
    line: int = 0

    @property
    def name(self) -> str:
        """How error messages call this document."""
        where = f"line {self.line}" if self.line else f"{self.text[:24]!r}…"
        return f"document at {where} (domain {self.domain!r})"


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of a JSONL file; blank lines are skipped.

    Args:
        path: UTF-8 file, one JSON object a line.

    Raises:
        UsageError: not readable, not UTF-8, a line that is not a JSON object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except OSError as err:
        raise UsageError(f"{path}: cannot be read ({err.strerror or err})") from None
    except UnicodeDecodeError as err:
        raise UsageError(f"{path}: not UTF-8 at byte {err.start}") from None


def read_documents(path: Path) -> list[Document]:
    """Read documents from a JSONL file of {"text": str, "domain"?: str}.

    Args:
        path: the file; other fields of a row are ignored.

    Returns:
        The documents in file order, at least one.

    Raises:
        UsageError: unreadable file, a row without text, an empty text, an empty file; the message
            names the file and the line.
    """
    documents = [_document(path, number, row) for number, row in read_rows(path)]
    if not documents:
        raise UsageError(f'{path}: no documents; expected lines of {{"text": …, "domain": …}}')
    return documents


def rows_to_bytes(rows: Iterable[dict[str, Any]]) -> bytes:
    """Encode rows as JSONL, in the given order and with the given key order."""
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def by_domain(documents: Sequence[Document]) -> dict[str, list[int]]:
    """Domain to the indices of its documents, domains in alphabetical order."""
    groups: dict[str, list[int]] = {name: [] for name in sorted({d.domain for d in documents})}
    for index, document in enumerate(documents):
        groups[document.domain].append(index)
    return groups


def sha256_files(paths: Sequence[Path]) -> str:
    """Hash names and bytes of files, independent of the folder they are in.

    Args:
        paths: existing files; their order does not matter.
    """
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        total.update(f"{path.name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as err:
        raise UsageError(f"{path}:{number}: not JSON ({err.msg} at column {err.colno})") from None
    if not isinstance(row, dict):
        raise UsageError(f"{path}:{number}: expected an object, found {type(row).__name__}")
    return row


def _document(path: Path, number: int, row: dict[str, Any]) -> Document:
    text, domain = row.get("text"), row.get("domain")
    if not isinstance(text, str):
        found = "nothing" if "text" not in row else type(text).__name__
        raise UsageError(f'{path}:{number}: field "text" must be a string, found {found}')
    if not text.strip():
        raise UsageError(f'{path}:{number}: field "text" is empty')
    if domain is not None and not (isinstance(domain, str) and domain.strip()):
        raise UsageError(
            f'{path}:{number}: field "domain" must be a non-empty string, found {domain!r}'
        )
    return Document(text, domain or UNLABELLED, number)
