"""README and CONTRIBUTING name what exists, and the results are those that were stored.

tests/docs runs what they tell people to type.
"""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

from fissile.cli.main import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = README + (ROOT / "CONTRIBUTING.md").read_text("utf-8")
DOCS = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").rglob("*.md")))


def test_the_table_lists_every_command_and_its_form_parses() -> None:
    rows = re.findall(r"^\| `fissile (.*?)` \|", README, re.MULTILINE)
    assert [row.split()[0] for row in rows] == list(COMMANDS)
    parser, _ = build_parser()
    for row in rows:
        assert parser.parse_args(shlex.split(row)).command == row.split()[0]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    code = "\n".join(re.findall("`.*?`|^    .*$|^make .*$", DOCUMENTS + DOCS, re.M))
    named = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"demo", "test"} <= named <= targets


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", DOCUMENTS)
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_tables_are_the_stored_results() -> None:
    """`python docs/tools/result_tables.py` would change nothing."""
    refreshed = import_module("result_tables").refreshed
    assert README.count("<!-- table: ") == README.count("<!-- end of table -->") >= 4
    assert refreshed(README) == README
    assert refreshed(README.replace("| GPTQ |", "| GPTQ | 1 |")) == README
