"""One page a command, from the parser that the command line itself uses."""

from __future__ import annotations

import os
import re
from argparse import Action, _ArgumentGroup, _SubParsersAction

from fissile.cli.common import Parser
from fissile.cli.main import DESCRIPTION, EPILOG, build_parser


def pages() -> dict[str, str]:
    """Path below docs/ to Markdown."""
    os.environ["COLUMNS"] = "80"  # argparse wraps to the terminal otherwise
    parser, commands = build_parser()
    found = {f"commands/{name}.md": _page(name, own) for name, own in commands.items()}
    return {"commands/index.md": _index(parser)} | found


def _index(parser: Parser) -> str:
    listed = next(a for a in parser._actions if isinstance(a, _SubParsersAction))
    rows = [
        f"| [`fissile {entry.dest}`]({entry.dest}.md) | {_cell(_help(entry))} |"
        for entry in listed._get_subactions()
    ]
    codes = EPILOG.partition("exit codes:\n")[2].partition("\n\n")[0]
    meanings = "\n".join(f"- {item.strip()}" for item in re.split(r" · |\n", codes))
    return (
        f"# Commands\n\n{DESCRIPTION}\n\n"
        "Results go to stdout, progress and log to stderr; `--json` prints one JSON object.\n\n"
        "| command | does |\n|---|---|\n" + "\n".join(rows) + f"\n\nExit codes:\n\n{meanings}\n"
    )


def _page(name: str, parser: Parser) -> str:
    usage = parser.format_usage().removeprefix("usage: ").replace("\n       ", "\n").rstrip()
    example = (parser.epilog or "").partition("example:")[2]
    lines = [line.strip() for line in example.strip().splitlines()]
    parts = [
        f"# fissile {name}",
        " ".join((parser.description or "").split()),
        f"```text\n{usage}\n```",
        *(_group(group) for group in parser._action_groups if group.title != "common flags"),
        "`--json`, `--debug`, `-v`, `-q` and `--threads N` are common to all commands.",
        "Example:\n\n```sh\n" + "\n".join(lines) + "\n```" if lines else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _group(group: _ArgumentGroup) -> str:
    shown = [action for action in group._group_actions if action.dest != "help"]
    if not shown:
        return ""
    rows = [f"| {_words(action)} | {_cell(_help(action))} |" for action in shown]
    title = (group.title or "").capitalize()
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(rows)


def _words(action: Action) -> str:
    name = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    if not action.option_strings:
        return f"`{name}`"
    value = "" if action.nargs == 0 else f" {name}"
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


def _help(action: Action) -> str:
    return " ".join((action.help or "").replace("%%", "%").split())


def _cell(text: str) -> str:
    return re.sub(r"([<>|*_\[\]])", r"\\\1", text)
