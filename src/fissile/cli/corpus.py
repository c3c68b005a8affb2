"""`fissile corpus`: labelled text from what every installation has, nothing downloaded."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command
from fissile.cli.output import emit, tidy


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "corpus",
        run,
        summary="build labelled text from this installation",
        description="Collect the documentation, library code and headers of this Python "
        "installation as JSONL with a domain per document, split by file into calibration and "
        "held-out text. Nothing is downloaded.",
        example="fissile corpus --out text",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the JSONL files")
    return parser


def run(args: argparse.Namespace) -> int:
    """Build the files and print what is in them."""
    from fissile.eval.corpus import build_corpus

    built = asdict(build_corpus(Path(args.out)))
    emit(args, built, tidy(built))
    return 0
