"""`fissile plan`: what a run would do and cost, from the config and the safetensors headers."""

from __future__ import annotations

import argparse
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, add_overrides
from fissile.cli.output import emit


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        summary="what a run would do and cost, from headers alone",
        description="Read config.json and the safetensors headers, no weights: say what a run "
        "does, its memory, disk and time, and what will not work (exit code 4 if it does not fit).",
        example="fissile plan demo/moe-nested --model MODEL_DIR --set extract.active_share=0.5",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a shipped one")
    parser.add_argument(
        "--model",
        metavar="SRC",
        help="folder of the model (default: the published config.json beside a shipped recipe)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where the run would write (its disk is checked)"
    )
    add_overrides(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the plan, then fail if it does not fit this machine."""
    from fissile.recipe_files import find_recipe, load_recipe

    path, out = find_recipe(args.recipe), Path(args.out) if args.out else None
    recipe = load_recipe(path, args.set)
    if args.model:
        from fissile.run.plan import make_plan

        plan = make_plan(recipe, Path(args.model), out)
    else:
        from fissile.run.recipe_header import published_plan

        plan = published_plan(recipe, path, out)
    emit(args, plan.to_dict(), plan.lines())
    plan.check()
    return 0
