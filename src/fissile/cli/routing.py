"""`fissile routing`: how redundant the routers of a mixture of experts are."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, positive
from fissile.cli.output import emit
from fissile.cli.progress import progress


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "routing",
        run,
        summary="how much the layers of a mixture of experts choose alike",
        description="Run text through a mixture of experts, ours or any that transformers knows, "
        "and measure its choices: entropy, mutual information and transitions between "
        "neighbouring layers, and how long a choice lasts from token to token.",
        example="fissile routing runs/demo --data valid.jsonl --out routing",
    )
    parser.add_argument("source", metavar="SRC", help="a model, an artifact or a run folder")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL of documents")
    parser.add_argument(
        "--tokens", type=positive, default=16384, metavar="N", help="tokens to read (16384)"
    )
    parser.add_argument(
        "--context", type=positive, default=512, metavar="N", help="tokens per window (512)"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens per forward pass"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for routing.json and routing.html")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write both files where asked."""
    from fissile.run.routing import analyse_routing, summary_lines, write_routing

    # Left out, the library's own default holds: it is stated once, there.
    batch = {} if args.batch_tokens is None else {"batch_tokens": args.batch_tokens}
    with progress(args) as show:
        found = analyse_routing(
            Path(args.source),
            Path(args.data),
            tokens=args.tokens,
            context=args.context,
            progress=show,
            **batch,
        )
    lines = summary_lines(found)
    if args.out:
        lines += [str(path) for path in write_routing(found, Path(args.out))]
    emit(args, found, lines)
    return 0
