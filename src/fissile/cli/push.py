"""`fissile push`: upload a verified folder to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, one_of, positive
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress
from fissile.cli.verify import TARGETS


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "push",
        run,
        summary="upload a verified artifact or export to the Hugging Face hub",
        description="Verify a folder, and only if every check holds upload the files that its "
        "manifest lists, and no others (exit code 5 if a check fails). Nothing is ever sent unless "
        "this command is called; the hub's own login is used.",
        example="fissile push runs/demo --repo ORG/NAME --dry-run",
    )
    parser.add_argument("folder", metavar="DIR", help="an artifact, run folder or export")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the hub")
    parser.add_argument("--public", action="store_true", help="a new repository is not private")
    parser.add_argument(
        "--dry-run", action="store_true", help="verify and list what would be sent, send nothing"
    )
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
    return parser


def run(args: argparse.Namespace) -> int:
    """Verify, upload, print what was sent."""
    from fissile.export.push import push

    with progress(args) as show:
        result = push(
            Path(args.folder),
            args.repo,
            against=Path(args.against) if args.against else None,
            target=args.target,
            bits=args.bits,
            private=not args.public,
            dry_run=args.dry_run,
            progress=show,
        )
    emit(args, result, tidy({**result, "files": len(result["files"])}))
    return 0
