"""Every command and snippet of README, CONTRIBUTING and docs runs, in the order it is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from tests.docs.snippets import DOCS, NOT_RUN, ROOT, Sandbox, Snippet, snippets_of

from fissile.cli.main import COMMANDS, build_parser

# Pages of the tutorial build on each other; every other document stands alone.
TUTORIAL = [f"docs/tutorial/{name}.md" for name in ("convert", "evaluate", "serve", "own-text")]
NAMES = ["README.md", "CONTRIBUTING.md", *TUTORIAL]
NAMES += sorted({path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md")} - {*NAMES})
HELP = "the help of the commands"
BEFORE = {
    HELP: [
        "fissile run demo/moe-nested --model MODEL_DIR --out runs/demo",
        "fissile eval MODEL_DIR --task perplexity --data valid.jsonl --out dense.json",
        "fissile eval runs/demo --task perplexity --data valid.jsonl --out three-bits.json",
    ],
}
"""Commands that make what a document takes as given."""


def of(name: str) -> list[Snippet]:
    return snippets_of(name, (ROOT / name).read_text("utf-8"))


def of_help() -> list[Snippet]:
    """The examples at the end of each command's help, which the reference prints."""
    _, parsers = build_parser()
    found = []
    for name in COMMANDS:
        example = (parsers[name].epilog or "").partition("example:")[2].strip()
        assert example.startswith(f"fissile {name}")
        found += [Snippet(name, "sh", line.strip()) for line in example.splitlines()]
    return found


SCRIPTS = {
    name: of(name)
    for name in NAMES
    if name not in TUTORIAL and any(snippet.reason is None for snippet in of(name))
}
SCRIPTS |= {"tutorial": [snippet for name in TUTORIAL for snippet in of(name)], HELP: of_help()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_document_runs(name: str, new_sandbox: Callable[[], Sandbox]) -> None:
    sandbox, names = new_sandbox(), dict[str, Any]()
    given = [Snippet("before", "sh", line) for line in BEFORE.get(name, [])]
    for snippet in [*given, *SCRIPTS[name]]:
        if snippet.reason is None:
            sandbox.run(snippet, names)


def test_little_is_left_out_and_all_of_it_is_still_there() -> None:
    """A command that no test runs has a reason; a reason without a command is stale."""
    commands = [s.text for name in NAMES for s in of(name) if s.kind == "sh"]
    for form in NOT_RUN:
        assert any(re.fullmatch(form, command) for command in commands), form
    fissile = [c for c in commands if c.startswith("fissile ")]
    left = [c for c in fissile if any(re.fullmatch(form, c) for form in NOT_RUN)]
    assert len(left) <= 5 < len(fissile) / 8
    parser, _ = build_parser()
    for command in left:
        parser.parse_args(shlex.split(command)[1:])


def test_commands_are_nowhere_else() -> None:
    """In docs a command is in a fenced block, where it is found."""
    for path in DOCS.rglob("*.md"):
        assert not re.search(r"^ {2,}(fissile|python|pip|make) ", path.read_text("utf-8"), re.M), (
            path
        )


def test_a_wrong_command_is_noticed(new_sandbox: Callable[[], Sandbox]) -> None:
    sandbox = new_sandbox()
    for line in ("fissile plan demo/moe-nestd --model MODEL_DIR", "rm nothing"):
        with pytest.raises(AssertionError):
            sandbox.run(Snippet("here", "sh", line), {})
    shown = "llama        model_type llama\n…\n"
    sandbox.run(Snippet("here", "sh", "fissile families", output=shown), {})
    with pytest.raises(AssertionError, match="does not print"):
        sandbox.run(Snippet("here", "sh", "fissile families", output=shown.replace("…", "x")), {})
    with pytest.raises(ZeroDivisionError):
        sandbox.run(Snippet("here", "python", "1 / 0"), {})


def test_blocks_are_classified() -> None:
    text = 'a\n```sh\nfissile doctor\nfissile run \\\n  x\n```\n```yaml title="a.yaml"\nb: 1\n```\n'
    text += '```text title="output"\n…\nb\n```\n'
    found = snippets_of("page.md", text + "```text\nout\n```\n```python\nx = 1\n```\n")
    assert [s.output for s in found] == ["", "", "…\nb\n", ""]
    assert [(s.kind, s.text.split()[0], s.title) for s in found] == [
        ("sh", "fissile", ""),
        ("sh", "fissile", ""),
        ("file", "b:", "a.yaml"),
        ("python", "x", ""),
    ]
    with pytest.raises(ValueError, match=r"page\.md:1: a yaml block"):
        snippets_of("page.md", "```yaml\nb: 1\n```\n")
    indented = snippets_of("README.md", "Text\n\n    fissile doctor  # why\n")
    assert [(s.where, s.text) for s in indented] == [("README.md:3", "fissile doctor")]
