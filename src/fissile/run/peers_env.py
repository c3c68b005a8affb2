"""An environment of its own for quantizers from PyPI: built once, with pinned versions."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from fissile.errors import UsageError
from fissile.refactor.training import Progress

PINS = {"hqq": "0.2.8.post1", "auto-round": "0.16.1", "gptqmodel": "7.6.0"}
"""Package to the version that is installed: the newest of each that runs with torch 2.13."""
_UNFINISHED = "unfinished"
_SHARED = ("torch", "transformers")
_BUILD = {"BUILD_CUDA_EXT": "0", "MAX_JOBS": "1"}
_PROBE = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
sys.stdout.write(json.dumps(found))
"""


def interpreter(folder: Path) -> Path:
    """Python of an environment."""
    return folder / "bin" / "python"


def installed(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Versions of packages in an environment; what is not there is left out.

    Raises:
        UsageError: the folder holds no environment whose Python runs.
    """
    command = [str(interpreter(folder)), "-I", "-c", _PROBE, *names]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as err:
        raise UsageError(
            f"{folder}: is no environment with a Python that runs ({err}); name a folder that does"
            " not exist yet to have one built"
        ) from None
    return dict(json.loads(text))


def ensure(folder: Path, names: Sequence[str], progress: Progress) -> dict[str, str]:
    """Build the environment unless it is there; say what of it cannot be used.

    torch comes first and everything after it is held to its version, so that no other build of
    torch is fetched. A package that fails to install leaves the others alone.

    Args:
        folder: of the environment; one that exists is taken as it is.
        names: packages of `PINS`.
        progress: called as (stage, done, total, detail).

    Returns:
        Package to the reason why it is not there; empty when all are.

    Raises:
        UsageError: the folder is something else, or torch cannot be installed.
    """
    folder = folder.absolute()
    mark, reasons = folder / _UNFINISHED, {}
    if not folder.exists() or mark.exists():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        progress("environment", 0, len(names) + 1, str(folder))
        venv.create(folder, with_pip=True)
        held = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in _SHARED]
        (folder / "held.txt").write_text("\n".join(held) + "\n", encoding="utf-8")
        if reason := _install(folder, held):
            raise UsageError(f"{folder}: {', '.join(held)}: {reason}")
        for done, name in enumerate(names, start=1):
            progress("environment", done, len(names) + 1, name)
            if reason := _install(folder, [f"{name}=={PINS[name]}"]):
                reasons[name] = reason
        mark.unlink()
    found = installed(folder, names)
    missing = {name: f"not installed in {folder.name}" for name in names if name not in found}
    return missing | {name: reason for name, reason in reasons.items() if name in missing}


def _install(folder: Path, wanted: list[str]) -> str | None:
    """Install packages; the reason if that fails."""
    command = [str(interpreter(folder)), "-m", "pip", "install", "-q", "-c", "held.txt", *wanted]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | _BUILD, capture_output=True, text=True
    )
    return None if done.returncode == 0 else failure(done.stderr)


def failure(text: str) -> str:
    """The line of a log that says why a program failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "rror: " in line or line.startswith("ERROR")]
    return (telling or lines or ["no message"])[-1][:300]


def start(folder: Path, script: Path, job: Path, threads: int) -> str | None:
    """Run a script with the environment's Python; its output goes to `log` beside the job.

    Args:
        folder: of the environment.
        script: that imports nothing of this package.
        job: its argument.
        threads: of torch and of what else computes.

    Returns:
        None, or the reason why it failed.
    """
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # On two cores GPTQModel plans for less than it then asks for.
        "GPTQMODEL_CPU_WORKERS": "2",
    }
    log = job.with_name("log")
    command = [str(interpreter(folder)), "-I", str(script), str(job)]
    with log.open("wb") as file, _child(command, settings, file, job.parent) as child:
        code = child.wait()
    return None if code == 0 else failure(log.read_text(encoding="utf-8", errors="replace"))


@contextmanager
def _child(
    command: list[str], settings: Mapping[str, str], log: BinaryIO, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block."""
    child = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log, cwd=folder)
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
