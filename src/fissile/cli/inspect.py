"""`fissile inspect`: what a model, an artifact or a run folder holds, from its headers."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command
from fissile.cli.output import emit, tidy


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "inspect",
        run,
        summary="what a model or an artifact holds",
        description="Read config.json and the safetensors headers, no weights; say what is there.",
        example="fissile inspect runs/demo",
    )
    parser.add_argument("source", metavar="SRC", help="a model, an artifact or a run folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the findings."""
    from fissile.run.inspect import inspect_source

    found = inspect_source(Path(args.source))
    emit(args, found, tidy(found))
    return 0
