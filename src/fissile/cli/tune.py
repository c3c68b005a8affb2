"""`fissile tune`: floats of an artifact for a task, and the artifact with them."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, add_overrides, positive
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress
from fissile.errors import UsageError


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "tune",
        run,
        summary="train an artifact's scales, zeros and norms on text; integers stay",
        description="One integer tensor, many tasks. With --data: train the floats of every width "
        "on a task's text and write them alone, a small file. With --floats: write the artifact "
        "anew with such a file, the same integers inside. Once for all: --set rank=8 --set "
        "period=64 trains all mixes of widths, --budget then finds the best one that fits.",
        example="fissile tune nested --data task.jsonl --out task.safetensors\n"
        "  fissile tune nested --floats task.safetensors --out nested-task",
    )
    parser.add_argument("folder", metavar="DIR", help="an artifact or a run folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="FILE", help="text of the task, JSONL")
    what.add_argument("--floats", metavar="FILE", help="what --data wrote")
    parser.add_argument("--out", required=True, metavar="PATH", help="file or folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--steps", type=positive, default=100, metavar="N", help="of training")
    parser.add_argument("--tokens", type=positive, default=65536, metavar="N", help="of the text")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    parser.add_argument(
        "--budget", metavar="SIZE", help="search a width for every weight too: 2.6bpw, 4GiB"
    )
    parser.add_argument(
        "--mixes",
        type=positive,
        default=100,
        metavar="N",
        help="of --budget: random mixes that are scored, and half as many within the budget",
    )
    add_overrides(parser, "a key of a recipe's quantize.tune", "learning_rate=1e-3")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train and write the floats, or the artifact with them."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise UsageError(f"{out} exists; pass --overwrite to replace it, or another --out")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: its folder does not exist")
    if args.floats is not None and args.budget is not None:
        raise UsageError("--budget belongs to --data: --floats holds the widths that were found")
    from fissile.config import Tune
    from fissile.recipe_files import parse_settings
    from fissile.run.tasks import tune_task, with_floats

    if args.floats is not None:
        result = with_floats(Path(args.folder), Path(args.floats), out, overwrite=args.overwrite)
    else:
        settings = parse_settings(Tune, [f"steps={args.steps}", *args.set])
        with progress(args) as show:
            result = tune_task(
                Path(args.folder),
                Path(args.data),
                out,
                settings=settings,
                tokens=args.tokens,
                seed=args.seed,
                progress=show,
                budget=args.budget,
                mixes=(args.mixes, max(1, args.mixes // 2)),
            )
    emit(args, result, tidy(result))
    return 0
