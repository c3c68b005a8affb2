"""Commands and snippets of README and docs: found, classified, and executed in a sandbox.

A document is a script: its blocks run from top to bottom in one folder, on a tiny model.

    ```sh                    each line is a command
    ```python                runs; blocks of a page share their names
    ```yaml title="NAME"     written to the file NAME (json likewise)
    ```text title="output"   lines that the command above it prints, numbers aside; … leaves out
    ```text                  a form, not executed

README and CONTRIBUTING indent their commands by four spaces instead.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fissile.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (?=\S)(.*)$", re.MULTILINE)

NOT_RUN = {
    r"make \S+( .*)?": "the suite runs inside of one; a test holds that the target exists",
    r"\. \.venv/bin/activate": "the environment of the tests is not .venv",
    r"git clone .*": "the clone is what is being tested",
    r"\.venv/bin/.*": "the suite's own tools, on itself",
    r"fissile eval \S+ --harness arc_easy,hellaswag --download": "fetches data sets",
    r"fissile verify second-gguf --target llama\.cpp": "starts llama.cpp (make serve-test does)",
    r"fissile verify runs/first --target vllm": "starts vLLM (make serve-test does)",
    r"vllm serve \S+( --hf-overrides .*)?": "starts vLLM (make serve-test does)",
    r"transformers serve second-mixtral": "starts a server (make serve-test does)",
    r"npx --yes node-llama-cpp@.*": "fetches llama.cpp (make serve-test runs the same file in it)",
    r"python examples/.*": "tests/test_examples.py runs it on the demo model",
    r"accelerate launch .*": "two processes: test_launch.py, refactor/test_distributed.py",
    r"(OMP_NUM_THREADS=1 )?torchrun .*": "two processes: test_launch.py starts them",
    r"fissile bench ranks": "needs two free cores for minutes (a small one: run/test_bench.py)",
}
"""Commands that no test of this folder executes, and why."""

SMALLER: dict[str, list[str]] = {
    "eval": ["--limit", "8"],
    "quantize": ["--tokens", "1024", "--effort", "fast"],
    "tune": ["--steps", "2", "--tokens", "256"],
    "generate": ["--tokens", "3"],
    "routing": ["--tokens", "256", "--context", "64"],
    "trace": ["--requests", "2", "--prompt", "4,8", "--output", "2,4"],
    "compare": ["--resamples", "100"],
}
"""Flags that are appended, so that a command that is right takes a second; the last one counts."""


@dataclass(frozen=True)
class Snippet:
    """One thing to execute.

    Attributes:
        where: document and place, for messages.
        kind: "sh" (one command), "python", or "file".
        text: the command, the code, or the contents.
        title: of a file.
        output: what the document says that a command prints.
    """

    where: str
    kind: str
    text: str
    title: str = ""
    output: str = ""

    @property
    def reason(self) -> str | None:
        """Why this command is not executed; None if it is."""
        if self.kind != "sh":
            return None
        return next((why for form, why in NOT_RUN.items() if re.fullmatch(form, self.text)), None)


def snippets_of(name: str, text: str) -> list[Snippet]:
    """Everything in a document that can be executed, in order.

    Raises:
        ValueError: a block of a kind that is neither executed nor known as output.
    """
    found: list[tuple[int, Snippet]] = []
    for block in FENCE.finditer(text):
        kind, title, body = block.groups()
        where = f"{name}:{text.count(chr(10), 0, block.start()) + 1}"
        if kind == "sh":
            lines = body.replace("\\\n", " ").splitlines()
            found += [(block.start(), Snippet(where, "sh", line)) for line in lines if line]
        elif kind == "python":
            found.append((block.start(), Snippet(where, "python", body)))
        elif (kind, title) == ("text", "output"):
            at, above = found[-1]
            found[-1] = (at, replace(above, output=body))
        elif title:
            found.append((block.start(), Snippet(where, "file", body, title)))
        elif kind != "text":
            raise ValueError(f"{where}: a {kind} block without a title")
    if name in ("README.md", "CONTRIBUTING.md"):
        blank = FENCE.sub(lambda block: re.sub(r"[^\n]", " ", block[0]), text)
        for line in INDENTED.finditer(blank):
            where = f"{name}:{text.count(chr(10), 0, line.start()) + 1}"
            command = line[1].split("  #")[0].strip()
            found.append((line.start(), Snippet(where, "sh", command)))
    return [snippet for _, snippet in sorted(found, key=lambda item: item[0])]


WILD = {
    r"[-+]?\d[\d,.]*(e[-+]?\d+)?( ?(s|min|h|%|[kMG]?B|M)\b)?": "#",
    r"\b(c|english|python|reference)\b(?= +(A )?#)": "DOMAIN",
    r"A is better|B is better|no difference seen": "VERDICT",
    r"\bin (calibrate|extract|route|recover|quantize|export|verify|evaluate|report)\b": "in STAGE",
}
"""What differs between a model that a document speaks of and the one that tests have."""


def skeleton(line: str) -> str:
    """A line of output without what depends on the model, the text and the machine."""
    for form, name in WILD.items():
        line = re.sub(form, name, line)
    return " ".join(line.split())


def not_printed(shown: str, printed: str) -> list[str]:
    """Lines of a document's output that a command did not print."""
    real = {skeleton(line) for line in printed.splitlines()}
    return [line for line in shown.splitlines() if line != "…" and skeleton(line) not in real]


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Sandbox:
    """A folder with what documents name, in which their snippets run.

    Args:
        folder: to work in.
        finished: a run folder of the demo recipe on the tiny model.
        settings: the `--set` words that it was made with.
    """

    def __init__(self, folder: Path, finished: Path, settings: list[str]) -> None:
        self.folder, self.finished, self.settings = folder, finished, settings

    def run(self, snippet: Snippet, names: dict[str, Any]) -> None:
        """Execute a snippet; `names` are those of the document's Python.

        Raises:
            AssertionError: a command did not end with 0.
        """
        with inside(self.folder):
            if snippet.kind == "file":
                Path(snippet.title).write_text(snippet.text, encoding="utf-8")
            elif snippet.kind == "python":
                exec(compile(snippet.text, snippet.where, "exec"), names)
            else:
                self._command(snippet)

    def _command(self, snippet: Snippet) -> None:
        program, *words = shlex.split(snippet.text, comments=True)
        printed = io.StringIO()
        if program == "fissile":
            with redirect_stdout(printed):
                code = main(self._small(words))
        elif program == "python":
            code = subprocess.run([sys.executable, *words], check=False).returncode
        else:
            raise AssertionError(f"{snippet.where}: no test knows how to run {program!r}")
        assert code == 0, f"{snippet.where}: {snippet.text}: exit code {code}"
        wrong = not_printed(snippet.output, printed.getvalue())
        assert not wrong, f"{snippet.where}: {snippet.text}: does not print {wrong}"

    def _small(self, words: list[str]) -> list[str]:
        """The same command with less to do; a recipe on its own continues the finished run."""
        name, *rest = words
        if "--threads" in rest:  # they would stay for the tests after this one
            at = rest.index("--threads")
            del rest[at : at + 2]
        if name in ("plan", "run"):
            recipe, *flags = rest
            rest = [recipe, *self._settings(recipe), *flags]
            if name == "run":
                rest += self._continue(recipe, flags)
        if name == "export" and "--data" in rest:
            rest += ["--group-size", "32", "--tokens", "512"]
        if name == "bench" and rest[:1] == ["layer"]:
            small = ("tokens=512", "width=64", "neurons=256", "shared=32")
            rest += [word for setting in small for word in ("--set", setting)]
        return [name, *rest, *([] if "--harness" in rest else SMALLER.get(name, []))]

    def _settings(self, recipe: str) -> list[str]:
        """Small budgets; text only where the recipe names none."""
        pairs = list(zip(self.settings[::2], self.settings[1::2], strict=True))
        own = Path(recipe).is_file()
        kept = [p for p in pairs if not (own and ".data=" in p[1])]
        return [word for pair in kept for word in pair]

    def _continue(self, recipe: str, flags: list[str]) -> list[str]:
        own = [w for w in flags[flags.index("--set") :] if w != "--set"] if "--set" in flags else []
        same = {w for w in own if "=" in w} <= set(self.settings)
        out = Path(flags[flags.index("--out") + 1])
        if Path(recipe).is_file() or not same or "--resume" in flags:
            return []
        shutil.copytree(self.finished, out)
        return ["--resume"]
