"""`fissile recipes`: list the shipped recipes, show one resolved, print the JSON schema."""

from __future__ import annotations

import argparse

from fissile.cli.common import Parser, Subparsers, add_command, one_of
from fissile.cli.output import emit
from fissile.errors import UsageError

ACTIONS = ("list", "show", "schema")


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "recipes",
        run,
        summary="list the recipes, show one with its defaults, print the schema",
        description="list: the shipped recipes. show NAME: one with every default filled in. "
        "schema: the JSON schema, for editors that complete YAML.",
        example="fissile recipes show demo/moe-nested",
    )
    parser.add_argument(
        "action",
        nargs="?",
        default="list",
        type=one_of(ACTIONS),
        metavar="ACTION",
        help=f"{', '.join(ACTIONS)} (default: list)",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the recipe to show")
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    if (args.action == "show") != (args.name is not None):
        need = "takes no name" if args.name else "needs the name of a recipe"
        raise UsageError(f"recipes {args.action} {need} (see fissile recipes --help)")
    return {"list": _list, "show": _show, "schema": _schema}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    from fissile.recipe_files import load_recipe, shipped_recipes

    rows = [
        {"name": name, "description": load_recipe(path).description, "path": path}
        for name, path in shipped_recipes().items()
    ]
    width = max((len(str(row["name"])) for row in rows), default=0)
    emit(args, {"recipes": rows}, [f"{row['name']:<{width}}  {row['description']}" for row in rows])
    return 0


def _show(args: argparse.Namespace) -> int:
    import yaml

    from fissile.recipe_files import find_recipe, load_recipe

    data = load_recipe(find_recipe(args.name)).model_dump(mode="json")
    emit(args, data, [yaml.safe_dump(data, sort_keys=False, allow_unicode=True).rstrip()])
    return 0


def _schema(args: argparse.Namespace) -> int:
    import json

    from fissile.config import Recipe

    schema = Recipe.model_json_schema()
    emit(args, schema, [json.dumps(schema, indent=2)])
    return 0
