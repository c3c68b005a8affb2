"""`fissile choices`: multiple-choice items cut from labelled text."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, at_least_zero, positive
from fissile.cli.output import emit, tidy
from fissile.errors import UsageError


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "choices",
        run,
        summary="make multiple-choice items from your own text",
        description="Cut items from labelled text: which of four pieces continues a document? The "
        "other three are cut from documents of the same domain, to the same length, so that even "
        "small models score well above chance. The file serves fissile eval --task choices and "
        "--task mmlu (its rows of split dev are the latter's examples).",
        example="fissile choices --data valid.jsonl --out choices.jsonl",
    )
    parser.add_argument(
        "--data", required=True, metavar="FILE", help="JSONL of documents (text, optional domain)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="JSONL of items to write")
    parser.add_argument(
        "--items", type=positive, default=25, metavar="N", help="for each domain (default: 25)"
    )
    parser.add_argument(
        "--shots",
        type=at_least_zero,
        default=5,
        metavar="N",
        help="example rows (split dev) for each domain (default: 5)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of places and order (default: 0)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the items and print how many there are."""
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist")
    from fissile.eval.continuations import build_choices

    build_choices(
        Path(args.data), out, items_per_domain=args.items, shots=args.shots, seed=args.seed
    )
    from fissile.eval.choices import read_items

    subjects = [item.subject for item in read_items(out)]
    counts = {name: subjects.count(name) for name in sorted(set(subjects))}
    found = {"out": out, "n_items": len(subjects), "shots": args.shots, "by_subject": counts}
    emit(args, found, tidy(found))
    return 0
