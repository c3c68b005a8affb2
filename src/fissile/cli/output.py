"""Results on stdout, complaints on stderr; a reader that went away is not an error."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

UNITS = ("B", "kB", "MB", "GB", "TB")


def emit(args: argparse.Namespace, payload: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print a command's result: the payload with --json, else the lines.

    Args:
        args: parsed arguments; `args.stdout`, set by `main`, is the real standard output.
        payload: the result as data; paths and non-finite numbers are made JSON.
        lines: the same for people.
    """
    found = [json.dumps(jsonable(payload), ensure_ascii=False)] if args.json else lines
    _write(args.stdout, "\n".join(found) + "\n")


def stream(args: argparse.Namespace, text: str) -> None:
    """Print a piece of the result as soon as it is known.

    Args:
        args: parsed arguments; `args.stdout`, set by `main`, is the real standard output.
        text: printed as it is, without a line end of its own.
    """
    _write(args.stdout, text)


def complain(text: str) -> None:
    """Write one line to stderr, whatever whitespace the message holds."""
    _write(sys.stderr, " ".join(text.split()) + "\n")


def finish() -> None:
    """Flush both streams here, where a closed pipe can still be kept quiet."""
    for stream in (sys.stdout, sys.stderr):
        _write(stream, "")


def jsonable(value: Any) -> Any:
    """Return `value` in JSON's own types: str keys, null for NaN and infinities, paths as text.

    Raises:
        TypeError: an object that has no JSON form.
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form: {value!r}")


def tidy(payload: Mapping[str, Any], indent: str = "") -> list[str]:
    """Lay a nested mapping out as aligned `key  value` lines, sections indented.

    Args:
        payload: str keys; values are scalars, mappings, or sequences of either.
        indent: put before every line.
    """
    plain = [key for key, value in payload.items() if _is_plain(value)]
    width = max((len(str(key)) for key in plain), default=0)
    lines = []
    for key, value in payload.items():
        if _is_plain(value):
            lines.append(f"{indent}{key!s:<{width}}  {_show(str(key), value)}".rstrip())
            continue
        lines.append(f"{indent}{key}")
        if isinstance(value, Mapping):
            lines += tidy(value, indent + "  ")
        else:
            lines += [f"{indent}  {_inline(item)}" for item in value]
    return lines


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return not value
    if isinstance(value, list | tuple):
        return not any(isinstance(item, Mapping) for item in value)
    return True


def _inline(item: Any) -> str:
    if not isinstance(item, Mapping):
        return _show("", item)
    return "  ".join(f"{key} {_show(str(key), value)}" for key, value in item.items())


def _show(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value in ((), [], {}):
        return "-"
    if isinstance(value, list | tuple):
        return ", ".join(_show(key, item) for item in value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_show(str(k), v)}" for k, v in value.items()) + "}"
    if isinstance(value, int | float) and key.endswith("bytes"):
        return human_bytes(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def human_bytes(count: float) -> str:
    """Format a number of bytes in decimal units, e.g. 15.9 MB."""
    for unit in UNITS:
        if abs(count) < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes everything")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # `| head` has seen enough. The interpreter flushes once more at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
