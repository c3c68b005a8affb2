"""Refuse to build from a copy of the source that lost the src/fissile/* links.

A zip archive or a Windows checkout without symlinks would otherwise install, then fail to import.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
PARTS = ("refactor", "quant", "kernels", "recipes", "eval")
lost = [name for name in PARTS if not (ROOT / "src" / "fissile" / name).is_dir()]
if lost:
    raise SystemExit(
        f"src/fissile/{lost[0]} is not a directory: this copy of the source lost its symbolic "
        "links. Install from a git clone (Windows: git config core.symlinks true), a .tar.gz, "
        "or a wheel."
    )
setup()
