"""`fissile quantize`: the quantization stage alone, on a dense or a routed model."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import (
    Parser,
    Subparsers,
    add_command,
    add_download,
    add_output,
    add_overrides,
    integers,
    positive,
)
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress

# Flags that are keys of the recipe's quantize section; its defaults and bounds hold.
KEYS = ("widths", "group_size", "effort", "tokens", "budget")


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "quantize",
        run,
        summary="bit-nested weights for any dense or routed model",
        description="Store every linear weight once, as an integer code whose leading bits are the "
        "codes of the smaller widths. Flags left out take the defaults of a recipe's "
        "quantize section (fissile recipes schema).",
        example="fissile quantize MODEL_DIR --out nested --data calibration.jsonl --widths 2,3,4",
    )
    parser.add_argument("source", metavar="SRC", help="the model")
    add_output(parser, "the artifact")
    parser.add_argument("--data", metavar="FILE", help="calibration text, JSONL (text, domain)")
    parser.add_argument("--widths", type=integers, metavar="K,K", help="e.g. 2,3,4")
    parser.add_argument("--group-size", type=positive, metavar="N", help="inputs per scale")
    parser.add_argument("--effort", metavar="WORD", help="fast, balanced or best")
    parser.add_argument("--budget", metavar="SIZE", help="mixed widths: 2.6bpw, 4GiB")
    parser.add_argument("--tokens", type=positive, metavar="N", help="calibration tokens")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    add_overrides(parser, "a key of the quantize section", "block.precision=bfloat16")
    add_download(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Quantize the model and print sizes and losses."""
    from fissile.recipe_files import parse_recipe

    given = {key: value for key in KEYS if (value := getattr(args, key)) is not None}
    keys = [f"quantize.{item}" for item in args.set]
    recipe = parse_recipe({"seed": args.seed, "quantize": given}, "quantize", keys)
    from fissile.run.pipeline import quantize_checkpoint
    from fissile.run.together import follows

    with progress(args) as show:
        result = quantize_checkpoint(
            args.source,
            Path(args.out),
            quantize=recipe.quantize,
            data=Path(args.data) if args.data else None,
            seed=recipe.seed,
            resume=args.resume,
            overwrite=args.overwrite,
            download=args.download,
            progress=show,
        )
    if follows():
        return 0
    emit(args, result, tidy(result))
    return 0
