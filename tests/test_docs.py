"""README and CONTRIBUTING name what exists, and the results are those that were stored.

tests/docs runs what they tell people to type.
"""

from __future__ import annotations

import json
import re
import shlex
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


def test_the_results_table_is_the_stored_run() -> None:
    """Every perplexity of the README's tables stands in eval/results/demo.json, in that place."""
    stored = json.loads((ROOT / "eval" / "results" / "demo.json").read_text())
    scores = {(v["name"], v["share"], v["recovery"]): v["ppl"] for v in stored["variants"]}
    widths = {(w["method"], w["of"], w["bits"]): w["ppl"] for w in stored["widths"]}
    wanted = [
        [scores[name, 0.5, step] for step in ("none", "refit")]
        for name in ("static", "pregate", "ridge", "oracle")
    ]
    wanted += [
        [widths[method, of, bits] for bits in (2, 3, 4)]
        for method, of in (
            ("nested", "converted"),
            ("dedicated", "converted"),
            ("gptq", "converted"),
            ("rtn", "converted"),
            ("nested", "dense"),
        )
    ]
    section = README.partition("<!-- results:")[2].partition("<!-- end")[0]
    rows = re.findall(r"^\|(?: [^|]+\|)((?: \d+\.\d\d \|)+)$", section, re.M)
    got = [[float(cell) for cell in row.split("|")[:-1]] for row in rows]
    assert got == [[round(value, 2) for value in row] for row in wanted]
