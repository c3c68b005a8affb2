"""`fissile families`: which architectures are known, and why a model is or is not one of them."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command
from fissile.cli.output import emit
from fissile.errors import UnsupportedModel


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "families",
        run,
        summary="the known model families; why a model is refused",
        description="List the model families, or check one model against its family field by field "
        "(exit code 3 if it is not supported).",
        example="fissile families --why MODEL_DIR",
    )
    parser.add_argument("--why", metavar="SRC", help="folder of the model to explain")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the families, or the checks of one model."""
    if args.why:
        return _why(args)
    from fissile.families import FAMILIES

    rows = [{"name": name, "model_types": list(f.model_types)} for name, f in FAMILIES.items()]
    lines = [f"{row['name']:<12} model_type {', '.join(row['model_types'])}" for row in rows]
    emit(args, {"families": rows}, lines)
    return 0


def _why(args: argparse.Namespace) -> int:
    from fissile.families import explain_source

    checks = explain_source(Path(args.why))
    refused = [check for check in checks if not check.ok]
    payload = {"supported": not refused, "checks": [asdict(check) for check in checks]}
    emit(args, payload, [f"{'ok' if check.ok else 'NO'}  {check}" for check in checks])
    if refused:
        raise UnsupportedModel(f"{args.why}: {refused[0]}")
    return 0
