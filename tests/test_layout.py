"""The repository's folder contract, checked from the working tree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("refactor", "quant", "kernels", "recipes", "eval")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("part", PARTS)
def test_part_is_linked_into_the_package(part: str) -> None:
    link = ROOT / "src" / "fissile" / part
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{part}"
    assert link.resolve() == ROOT / part


@pytest.mark.parametrize("part", PARTS)
def test_part_has_no_init(part: str) -> None:
    """An __init__.py here would shadow same-named installed packages (Hugging Face `kernels`)."""
    assert (ROOT / part).is_dir()
    assert not (ROOT / part / "__init__.py").exists()


def test_tests_have_no_init() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_an_installed_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("owner = 'installed'\n")
    done = run_python("import kernels; print(kernels.owner)", PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == "installed", done.stderr
