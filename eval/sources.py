"""Where an installation keeps text: one function per domain, explicit, found without importing.

Each yields items in any order; reading is left to the caller, who stops when it has enough.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.parser import Parser
from functools import partial
from importlib import metadata
from pathlib import Path

Read = Callable[[], "str | None"]


@dataclass(frozen=True)
class SourceItem:
    """A piece of text before it is read.

    Args:
        key: path relative to the installation, with forward slashes; unique in its domain.
        read: returns the text, or None if it cannot be read as UTF-8.
    """

    key: str
    read: Read


Source = Callable[[], Iterator[SourceItem]]

# Tests hold tables and fixtures, encodings hold code pages, the others are read by `english`.
_STDLIB_SKIP = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_HEADER_SUFFIXES = {".h", ".hpp", ".cuh"}
# Thousands of generated files of a dozen lines each, all alike.
_HEADER_SKIP = {"ops", "nvidia", "external"}
_DOCUMENTED = ("numpy", "scipy", "torch", "matplotlib", "sympy", "networkx")
_LEAST_DOCSTRING = 300


def python() -> Iterator[SourceItem]:
    """Modules of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return _files(root, "python", {".py"}, _STDLIB_SKIP)


def c() -> Iterator[SourceItem]:
    """C and C++ headers of Python (where its development files are installed), torch and numpy."""
    roots = {"Python": Path(sysconfig.get_paths()["include"])}
    for package, folder in (("torch", "include"), ("numpy", "_core/include")):
        if (found := _package(package)) is not None:
            roots[package] = found / folder
    for name, root in roots.items():
        yield from _files(root, name, _HEADER_SUFFIXES, _HEADER_SKIP)


def english() -> Iterator[SourceItem]:
    """Sections of the Python language reference, and descriptions of installed packages."""
    from pydoc_data import topics

    for name, text in topics.topics.items():
        yield SourceItem(f"pydoc_data/topics/{name}", partial(str, text))
    # Where packages are installed, no more: a module at work may have put folders of its own in
    # the path (setuptools does so with the packages it carries), which would change the text.
    places = [p for p in sys.path if Path(p).name in {"site-packages", "dist-packages"}]
    for distribution in metadata.distributions(path=places):
        name = distribution.metadata["Name"]
        if name:
            yield SourceItem(f"metadata/{name.lower()}", partial(_description, distribution))


def reference() -> Iterator[SourceItem]:
    """API documentation: the long docstrings of each module of scientific packages."""
    for package in _DOCUMENTED:
        if (root := _package(package)) is not None:
            for item in _files(root, package, {".py"}, {"tests", "_vendor", "testing"}):
                yield SourceItem(item.key, partial(_docstrings, item.read))


DOMAINS: dict[str, Source] = {
    "c": c,
    "english": english,
    "python": python,
    "reference": reference,
}
"""Every domain of the corpus, in alphabetical order."""


def _package(name: str) -> Path | None:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None


def _files(root: Path, prefix: str, suffixes: set[str], skip: set[str]) -> Iterator[SourceItem]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if path.suffix in suffixes and not skip.intersection(relative.parts):
            yield SourceItem(f"{prefix}/{relative.as_posix()}", partial(_read, path))


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _description(distribution: metadata.Distribution) -> str | None:
    raw = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO")
    if raw is None:
        return None
    found = Parser().parsestr(raw)
    text = found["Description"] or found.get_payload()
    return text if isinstance(text, str) else None


def _docstrings(read: Read) -> str | None:
    text = read()
    if text is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in other people's strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(n, clean=False) for n in ast.walk(tree) if isinstance(n, documented)]
    long = [inspect.cleandoc(doc) for doc in found if doc and len(doc) >= _LEAST_DOCSTRING]
    return "\n\n\n".join(long) or None
