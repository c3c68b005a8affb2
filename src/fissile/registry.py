"""Names to objects, imported on first use, with suggestions for misspelt names."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from fissile.errors import UsageError


def suggest(name: str, known: list[str]) -> str:
    """Return a "; did you mean ...?" clause, or an empty string when nothing is near.

    Args:
        name: the word that was not found.
        known: the words that would have been accepted.
    """
    near = difflib.get_close_matches(name, known, n=2)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


class Registry(Mapping[str, Any]):
    """A fixed table whose values are "package.module:attribute" strings.

    Args:
        kind: what an entry is called in error messages, e.g. "command".
        targets: name to "package.module:attribute".
    """

    def __init__(self, kind: str, targets: Mapping[str, str]) -> None:
        self._kind, self._targets = kind, dict(targets)

    def __getitem__(self, name: str) -> Any:
        """Import and return the object behind `name`.

        Raises:
            UsageError: no such name; the message suggests near ones and lists all.
        """
        if name not in self._targets:
            known = sorted(self._targets)
            raise UsageError(
                f"unknown {self._kind} {name!r}{suggest(name, known)} (known: {', '.join(known)})"
            )
        module, _, attribute = self._targets[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)
