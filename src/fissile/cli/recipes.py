"""`fissile recipes`: list, show one resolved, the JSON schema, the header with its estimates."""

from __future__ import annotations

import argparse

from fissile.cli.common import Parser, Subparsers, add_command, one_of
from fissile.cli.output import emit
from fissile.errors import UsageError

ACTIONS = ("list", "show", "schema", "header")


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "recipes",
        run,
        summary="list the recipes, show one with its defaults, print the schema",
        description="list: the shipped recipes. show NAME: one with every default filled in. "
        "schema: the JSON schema, for editors that complete YAML. header NAME: the comment that "
        "says what a run needs, estimated from the published config.json beside the recipe.",
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
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="the recipe to show, or to estimate"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the header into the recipe's file; into all shipped ones without NAME",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    named = args.action == "show" or (args.action == "header" and not args.write)
    if named and args.name is None:
        raise UsageError(
            f"recipes {args.action} needs the name of a recipe (see fissile recipes --help)"
        )
    if args.name is not None and args.action not in ("show", "header"):
        raise UsageError(f"recipes {args.action} takes no name (see fissile recipes --help)")
    if args.write and args.action != "header":
        raise UsageError("--write goes with recipes header")
    actions = {"list": _list, "show": _show, "schema": _schema, "header": _header}
    return actions[args.action](args)


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

    from fissile.recipe_files import recipe_schema

    schema = recipe_schema()
    emit(args, schema, [json.dumps(schema, indent=2)])
    return 0


def _header(args: argparse.Namespace) -> int:
    from fissile.io.publish import atomic_write_bytes
    from fissile.recipe_files import PUBLISHED, find_recipe, shipped_recipes
    from fissile.run.recipe_header import header, with_header

    if not args.write:
        lines = header(find_recipe(args.name))
        emit(args, {"header": lines}, lines)
        return 0
    every = [path for path in shipped_recipes().values() if (path.parent / PUBLISHED).is_file()]
    changed = []
    for path in [find_recipe(args.name)] if args.name else every:
        text = with_header(path).encode()
        if path.read_bytes() != text:
            atomic_write_bytes(path, text)
            changed.append(path)
    emit(args, {"changed": changed}, [f"{len(changed)} files changed", *map(str, changed)])
    return 0
