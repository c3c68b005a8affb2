"""Launcher commands of README and docs, started as they are printed, in two CPU processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable

from tests.docs.snippets import DOCS, ROOT, SMALLER, Sandbox, snippets_of

LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    # What accelerate would ask its own settings file for.
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--num_machines", "1"],
}
PRINTED = {
    snippet.text
    for path in (ROOT / "README.md", DOCS / "how" / "processes.md")
    for snippet in snippets_of(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    if "torchrun " in snippet.text or snippet.text.startswith("accelerate launch ")
}


def printed(*words: str) -> str:
    """The one printed command that has these words."""
    (command,) = [text for text in PRINTED if all(word in text for word in words)]
    return command


def started(command: str, sandbox: Sandbox, *more: str) -> dict[str, object]:
    """Result of a printed command, with less to do; its launcher is a module of this Python."""
    words = [word for word in shlex.split(command) if not word.startswith("OMP_NUM_THREADS=")]
    launcher, *rest = words
    if launcher == "accelerate":
        rest = rest[rest.index("launch") + 1 :]
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *rest, *more, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=sandbox.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # One of the processes speaks: two that had not joined would both print a result.
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_every_printed_launch_is_known() -> None:
    """The third, `--multi_gpu` without cut weights, is started by refactor/test_distributed.py."""
    forms = {("torchrun", "quantize"), ("torchrun", "run demo"), ("--use_fsdp",), ("--multi_gpu",)}
    assert {printed(*form) for form in forms} == PRINTED


def test_torchrun_quantizes(new_sandbox: Callable[[], Sandbox]) -> None:
    sandbox = new_sandbox()
    started(printed("torchrun", "quantize"), sandbox, *SMALLER["quantize"])
    config = json.loads((sandbox.folder / "nested" / "config.json").read_text("utf-8"))
    assert config["nested"]["widths"] == [2, 3, 4]


def test_accelerate_cuts_the_weights(
    new_sandbox: Callable[[], Sandbox], small_recipe: list[str]
) -> None:
    """Full training in two processes; the quantizer's processes are the other test's."""
    sandbox = new_sandbox()
    more = [*small_recipe, "--set", "recover.checkpoint_every=1", "--stop-after", "recover"]
    found = started(printed("--use_fsdp"), sandbox, *more)
    stages = found["stages"]
    assert isinstance(stages, list)
    assert stages[-1]["name"] == "recover"
    recipe = (sandbox.folder / "runs" / "cut" / "recipe.yaml").read_text("utf-8")
    assert "method: full" in recipe
