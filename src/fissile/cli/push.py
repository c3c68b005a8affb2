"""`fissile push`: upload a verified folder to the Hugging Face hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress
from fissile.cli.verify import add_checks


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
    add_checks(parser)
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository on the hub")
    parser.add_argument("--public", action="store_true", help="a new repository is not private")
    parser.add_argument(
        "--dry-run", action="store_true", help="verify and list what would be sent, send nothing"
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
