"""`fissile eval`: score a dense model, an artifact or a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from fissile.cli.common import Parser, Subparsers, add_command, one_of, positive
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress
from fissile.errors import UsageError

TASKS = ("perplexity", "choices")


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        summary="perplexity or multiple-choice accuracy",
        description="Score a model. perplexity: mean over the documents' predicted tokens, in "
        "non-overlapping windows. choices: length-normalised log-likelihood of each answer.",
        example="fissile eval runs/demo --task perplexity --data valid.jsonl --bits 3",
    )
    parser.add_argument("folder", metavar="DIR", help="a model, an artifact or a run folder")
    parser.add_argument(
        "--task", required=True, type=one_of(TASKS), metavar="TASK", help=" or ".join(TASKS)
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL of documents or items")
    parser.add_argument(
        "--bits", type=int, metavar="K", help="width to load (default: the artifact's)"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N (for a quick look)"
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens per window (default: at most 2048)"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens per forward pass"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the scores with their conditions."""
    from fissile.config import Width

    widths = get_args(Width)
    if args.bits is not None and args.bits not in widths:
        raise UsageError(f"--bits {args.bits}: accepted are {', '.join(map(str, widths))}")
    from fissile.eval.run import evaluate

    # Left out, the library's own default holds: it is stated once, there.
    batch = {} if args.batch_tokens is None else {"batch_tokens": args.batch_tokens}
    with progress(args) as show:
        result = evaluate(
            Path(args.folder),
            task=args.task,
            data=Path(args.data),
            bits=args.bits,
            limit=args.limit,
            context=args.context,
            progress=show,
            **batch,
        )
    payload = result.to_dict()
    emit(args, payload, tidy(payload))
    return 0
