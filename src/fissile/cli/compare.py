"""`fissile compare`: two stored results on the same items, pair by pair."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fissile.cli.common import Parser, Subparsers, add_command, positive
from fissile.cli.output import emit

if TYPE_CHECKING:
    from fissile.eval.compare import Comparison, Paired


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "compare",
        run,
        summary="two results of eval, pair by pair",
        description="Compare two files written by fissile eval --out on the same data: paired "
        "bootstrap intervals over documents, McNemar's test for accuracies. Differences are B "
        "against A. Results that do not pair are refused, naming the field.",
        example="fissile compare dense.json three-bits.json",
    )
    parser.add_argument("a", metavar="A.json", help="the result to compare with, e.g. dense")
    parser.add_argument("b", metavar="B.json", help="the result in question")
    parser.add_argument(
        "--resamples",
        type=positive,
        default=10_000,
        metavar="N",
        help="of the bootstrap (default: 10000)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the bootstrap (default: 0)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Compare and print the verdicts."""
    from fissile.eval.compare import compare
    from fissile.eval.result import read_result

    a, b = (read_result(Path(path)) for path in (args.a, args.b))
    found = compare(a, b, resamples=args.resamples, seed=args.seed)
    emit(args, found.to_dict(), _lines(found))
    return 0


def _lines(found: Comparison) -> Iterator[str]:
    direction = "higher" if found.total.higher_is_better else "lower"
    yield f"{found.task}: {found.total.metric}, {direction} is better; 95 % intervals, B against A"
    rows = {"all": found.total, **found.groups}
    width = max(map(len, rows))
    for name, row in rows.items():
        yield f"  {name:<{width}}  A {row.a:.4g}  B {row.b:.4g}  {change(row)}  {row.verdict}"
    total = found.total
    yield f"  {total.items} items in {total.clusters} independent units"
    if found.mcnemar is not None:
        test = found.mcnemar
        yield (
            f"  only A right {test.only_a}, only B right {test.only_b}:"
            f" p = {test.p_value:.3g} (McNemar, {test.method})"
        )
    if found.differs:
        yield f"  differs in: {', '.join(found.differs)}"


def change(row: Paired) -> str:
    """The difference and its interval in per cent, or in points of accuracy."""
    from math import expm1

    ends = (row.difference.value, row.difference.low, row.difference.high)
    unit = "points" if row.higher_is_better else "%"
    value, low, high = (100 * (end if row.higher_is_better else expm1(end)) for end in ends)
    return f"{value:+.2f} {unit} [{low:+.2f}, {high:+.2f}]"
