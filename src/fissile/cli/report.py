"""`fissile report`: write the report again from what a run folder holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command
from fissile.cli.output import emit


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "report",
        run,
        summary="report.html and report.json from a run folder",
        description="Write report.html and report.json from the files of a run folder; no model is "
        "loaded.",
        example="fissile report runs/demo",
    )
    parser.add_argument("folder", metavar="DIR", help="a run folder")
    return parser


def run(args: argparse.Namespace) -> int:
    """Write both files and print their paths."""
    from fissile.run.report import write_report

    page, data = write_report(Path(args.folder))
    emit(args, {"html": page, "json": data}, [str(data), str(page)])
    return 0
