"""`fissile eval`: score a dense model, an artifact or a run folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from fissile.cli.common import Parser, Subparsers, add_command, at_least_zero, one_of, positive
from fissile.cli.output import emit, jsonable, tidy
from fissile.cli.progress import progress
from fissile.errors import UsageError

TASKS = ("perplexity", "choices", "mmlu", "routing")
CONVENTIONS = ("fissile", "gptq", "lm-eval")
SCORINGS = ("letter", "continuation")


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "eval",
        run,
        summary="perplexity or multiple-choice accuracy",
        description="Score a model. perplexity: mean over the documents' predicted tokens, in "
        "non-overlapping windows. choices: length-normalised log-likelihood of each answer. mmlu: "
        "the scores of lm-evaluation-harness. routing: how the experts share "
        "the text, by layer and domain. --harness: any task of the "
        "harness itself (pip install 'fissile[eval]').",
        example="fissile eval runs/demo --task perplexity --data valid.jsonl --bits 3",
    )
    parser.add_argument("folder", metavar="DIR", help="a model, an artifact or a run folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", type=one_of(TASKS), metavar="TASK", help=" or ".join(TASKS))
    what.add_argument(
        "--harness", metavar="TASK[,TASK]", help="tasks of lm-evaluation-harness, by its names"
    )
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="JSONL of documents or items; for mmlu also CSV, parquet or a folder of them",
    )
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
        "--convention",
        type=one_of(CONVENTIONS),
        metavar="NAME",
        help=f"of perplexity: {', '.join(CONVENTIONS)} (default: {CONVENTIONS[0]})",
    )
    _add_items(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="store the result with its items, for fissile compare"
    )
    parser.add_argument(
        "--items", action="store_true", help="print the outcome of every item too, with --json"
    )
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens per forward pass"
    )
    return parser


def _add_items(parser: Parser) -> None:
    parser.add_argument(
        "--shots",
        type=at_least_zero,
        metavar="N",
        help="examples before a question (default: 5 for mmlu, a harness task's own)",
    )
    parser.add_argument(
        "--scoring",
        type=one_of(SCORINGS),
        metavar="WAY",
        help=f"of mmlu: {' or '.join(SCORINGS)} (default: {SCORINGS[0]})",
    )
    parser.add_argument(
        "--resume", action="store_true", help="of mmlu: take the subjects finished beside --out"
    )
    parser.add_argument(
        "--include-path", metavar="DIR", help="folder with further tasks for --harness"
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch data sets from the hub (--data cais/mmlu)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the scores with their conditions."""
    from fissile.config import Width

    widths = get_args(Width)
    if args.bits is not None and args.bits not in widths:
        raise UsageError(f"--bits {args.bits}: accepted are {', '.join(map(str, widths))}")
    if args.harness is not None:
        return _harness(args)
    if args.data is None:
        raise UsageError(f"--task {args.task} needs --data")
    if args.resume and (args.task != "mmlu" or args.out is None):
        raise UsageError("--resume continues --task mmlu with --out FILE")
    for name in ("shots", "scoring", "download"):
        if getattr(args, name) not in (None, False) and args.task != "mmlu":
            raise UsageError(f"--{name} is one of mmlu, not of {args.task}")
    if args.convention is not None and args.task != "perplexity":
        raise UsageError(f"--convention is one of perplexity, not of {args.task}")
    from fissile.eval.mmlu import MmluOptions
    from fissile.eval.mmlu_journal import remove_journal
    from fissile.eval.result import write_result
    from fissile.eval.run import evaluate

    # Left out, the library's own default holds: it is stated once, there.
    batch = {} if args.batch_tokens is None else {"batch_tokens": args.batch_tokens}
    shots = {} if args.shots is None else {"shots": args.shots}
    out = None if args.out is None else Path(args.out)
    scoring: Any = args.scoring or SCORINGS[0]
    options = MmluOptions(
        scoring=scoring,
        download=args.download,
        out=out,
        resume=args.resume,
        **shots,
    )
    with progress(args) as show:
        result = evaluate(
            Path(args.folder),
            task=args.task,
            data=Path(args.data),
            bits=args.bits,
            limit=args.limit,
            context=args.context,
            convention=args.convention or CONVENTIONS[0],
            mmlu=options,
            progress=show,
            **batch,
        )
    if out is not None:
        write_result(result, out)
        remove_journal(out)
    payload = result.to_dict(items=args.items and args.json)
    emit(args, payload, tidy(payload))
    return 0


def _harness(args: argparse.Namespace) -> int:
    """Run tasks of lm-evaluation-harness and print what it reports."""
    from fissile.eval.harness import HarnessOptions, run_harness

    options = HarnessOptions(
        shots=args.shots,
        include=None if args.include_path is None else Path(args.include_path),
        limit=args.limit,
        context=args.context,
        download=args.download,
        samples=args.out is not None,
        quiet=args.quiet,
        **({} if args.batch_tokens is None else {"batch_tokens": args.batch_tokens}),
    )
    found = run_harness(Path(args.folder), args.harness.split(","), args.bits, options)
    if args.out is not None:
        from fissile.io.publish import atomic_write_json

        atomic_write_json(Path(args.out), jsonable(found))
    payload = {key: value for key, value in found.items() if key != "samples"}
    emit(args, payload, tidy(payload))
    return 0
