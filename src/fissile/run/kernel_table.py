"""Rows of the kernel benchmark as CSV, as a plot, and as the README's table.

A cell without a row that a GPU measured says "not measured": a dry row is none.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fissile.errors import UsageError
from fissile.io.publish import atomic_write_bytes

BEGIN, END = "<!-- kernels: from fissile bench kernels -->", "<!-- end of kernels -->"
_BITS = (4, 3, 2)
_SHAPES = (("gate_up", 1), ("experts 8 top 2", 1), ("experts 8 top 1", 1), ("gate_up", 16))
NOT_MEASURED = "not measured"


def write_rows(path: Path, result: dict[str, Any]) -> None:
    """Write every row, then those of whole models' steps, with all conditions of the run.

    Args:
        path: the file, replaced.
        result: of the benchmark.
    """
    common = {
        key: value if isinstance(value, str | int | float) else json.dumps(value, sort_keys=True)
        for key, value in result["conditions"].items()
        if key not in ("tokens", "bits", "shapes")
    }
    common |= {f"ceiling_{key}": value for key, value in result["ceilings"].items()}
    steps = [
        {"kind": "step", "implementation": "fissile, whole step", **s} for s in result["steps"]
    ]
    rows = [{**row, **common} for row in (*result["rows"], *steps)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_bytes(path, text.getvalue().encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that `write_rows` wrote; numbers are numbers, empty cells are absent."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {key: _value(text) for key, text in row.items() if text} for row in csv.DictReader(file)
        ]


def readme_table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown table: time, share of copy bandwidth, ratio to bf16 and gemlite, or "not measured".

    Args:
        rows: of any runs; dry ones are left out.
    """
    real = [row for row in rows if not row["dry"] and "us" in row]
    devices = list(dict.fromkeys(row["device"] for row in real)) or ["GPU"]
    lines = [
        "| device | product | tokens | bits | µs | of copy bandwidth | over bf16 | over gemlite |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for device in devices:
        for shape, tokens in _SHAPES:
            for bits in _BITS:
                where = {"device": device, "shape": shape, "tokens": tokens, "bits": bits}
                found = _find(real, {**where, "implementation": "fissile"})
                cells = (
                    [NOT_MEASURED] * 4
                    if found is None
                    else [
                        f"{found['us']:.1f}",
                        _cell(found.get("share_of_TBps"), "{:.0%}"),
                        _cell(found.get("vs_bf16"), "{:.2f}"),
                        _cell(found.get("vs_gemlite"), "{:.2f}"),
                    ]
                )
                lines.append(f"| {device} | {shape} | {tokens} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_readme(path: Path, table: str) -> None:
    """Put `table` between the marks of a text file.

    Args:
        path: the file.
        table: from `readme_table`.

    Raises:
        UsageError: the file, or its marks, are not there.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    head, begin, rest = path.read_text("utf-8").partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"{path}: no lines {BEGIN} and {END}")
    atomic_write_bytes(path, f"{head}{BEGIN}\n{table}{END}{tail}".encode())


def draw(path: Path, result: dict[str, Any]) -> None:
    """Plot time over tokens for every shape, one line an implementation and width.

    Args:
        path: .svg or .png.
        result: of the benchmark.
    """
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if "us" in row]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = plt.subplots(
        -(-len(shapes) // 3) or 1, 3, figsize=(13, 3.4 * (-(-len(shapes) // 3) or 1)), squeeze=False
    )
    for axis, shape in zip(axes.flat, shapes, strict=False):
        own = [row for row in rows if row["shape"] == shape]
        for name, bits in dict.fromkeys((row["implementation"], row["bits"]) for row in own):
            line = [r for r in own if (r["implementation"], r["bits"]) == (name, bits)]
            label = name if bits == 16 else f"{name}, {bits} bits"
            style = "-" if name == "fissile" else "--" if bits == 16 else ":"
            axis.plot(
                [r["tokens"] for r in line],
                [r["us"] for r in line],
                style,
                marker="o",
                markersize=3,
                label=label,
            )
        axis.set(xscale="log", yscale="log", title=shape, xlabel="tokens", ylabel="µs")
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(shapes) :]:
        axis.remove()
    dry = "" if rows else "dry run: nothing was measured"
    figure.suptitle(dry or f"{result['conditions']['device']}, {result['conditions']['timing']}")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _find(rows: Sequence[dict[str, Any]], wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The last row with these values: a later run replaces an earlier one."""
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return found[-1] if found else None


def _cell(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
