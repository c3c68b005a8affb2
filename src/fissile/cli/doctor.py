"""`fissile doctor`: the environment in the form a bug report needs."""

from __future__ import annotations

import argparse

from fissile.cli.common import Parser, Subparsers, add_command
from fissile.cli.output import emit, tidy


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "doctor",
        run,
        summary="versions, memory, disk and devices, for bug reports",
        description="Print the versions, memory, disk and devices that a run would see.",
        example="fissile doctor --json",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Collect and print."""
    from fissile.run.doctor import collect

    found = collect()
    emit(args, found, tidy(found))
    return 0
