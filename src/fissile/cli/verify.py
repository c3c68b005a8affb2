"""`fissile verify`: reload an artifact in a fresh process and compare what can be compared."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, one_of, positive
from fissile.cli.output import emit
from fissile.cli.progress import progress
from fissile.errors import QualityGate

TARGETS = ("transformers", "vllm", "llama.cpp")


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "verify",
        run,
        summary="prove that an artifact or an export is whole and loads",
        description="Check every file's hash, every scale, the coverage of the tensors, what the "
        "engine demands, and, where the engine is installed, what it computes in a fresh process "
        "(exit code 5 if a check fails).",
        example="fissile verify runs/demo --against MODEL_DIR",
    )
    add_checks(parser)
    return parser


def add_checks(parser: Parser) -> None:
    """Arguments that say what is checked and against what."""
    parser.add_argument("folder", metavar="DIR", help="an artifact, run folder or export")
    parser.add_argument("--against", metavar="SRC", help="the model it was made from")
    parser.add_argument(
        "--target",
        type=one_of(TARGETS),
        default=TARGETS[0],
        metavar="NAME",
        help=f"what loads it: {', '.join(TARGETS)}",
    )
    parser.add_argument(
        "--bits", type=positive, metavar="K", help="width of the model in --against"
    )


def run(args: argparse.Namespace) -> int:
    """Print every check, then fail on those that did not hold."""
    from fissile.export.verify import verify

    with progress(args) as show:
        report = verify(
            Path(args.folder),
            against=Path(args.against) if args.against else None,
            target=args.target,
            bits=args.bits,
            progress=show,
        )
    marks = [("ok  " if check.ok else "FAIL", check) for check in report.checks]
    emit(args, report.to_dict(), [f"{m} {check.name}  {check.detail}" for m, check in marks])
    failed = [check for check in report.checks if not check.ok]
    if not report.ok:
        first = f": {failed[0].name}: {failed[0].detail}" if failed else ""
        raise QualityGate(f"{len(failed)} of {len(marks)} checks failed on {args.folder}{first}")
    return 0
