"""`fissile run`: dense checkpoint to routed, bit-nested artifact, every stage of a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import (
    STAGES,
    Parser,
    Subparsers,
    add_command,
    add_download,
    add_output,
    add_overrides,
    one_of,
)
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "run",
        run,
        summary="convert a dense model by a recipe",
        description=f"Run the stages of a recipe: {', '.join(STAGES)}. The artifact is written to "
        "DIR/model, the report to DIR/report.html.",
        example="fissile run demo/moe-nested --model MODEL_DIR --out runs/first",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a shipped one")
    parser.add_argument("--model", required=True, metavar="SRC", help="the dense model")
    add_output(parser, "the run")
    add_overrides(parser)
    parser.add_argument(
        "--stop-after",
        type=one_of(STAGES),
        metavar="STAGE",
        help=f"end after this stage: {', '.join(STAGES)}",
    )
    add_download(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the recipe; the last line names the report."""
    from fissile.recipe_files import find_recipe, load_recipe

    recipe = load_recipe(find_recipe(args.recipe), args.set)
    from fissile.run.pipeline import run_recipe
    from fissile.run.together import follows

    with progress(args) as show:
        summary = run_recipe(
            recipe,
            args.model,
            Path(args.out),
            resume=args.resume,
            overwrite=args.overwrite,
            stop_after=args.stop_after,
            download=args.download,
            progress=show,
        )
    if follows():
        return 0
    payload = {key: value for key, value in summary.to_dict().items() if key != "report"}
    lines = tidy(payload)
    if summary.report is not None:
        payload["report"] = summary.report
        lines.append(str(summary.report))
    emit(args, payload, lines)
    return 0
