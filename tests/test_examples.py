"""Every example runs as printed, and shows what it claims to show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def output_of(name: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not installed")
def test_training_loop() -> None:
    errors = dict(
        re.findall(r"^(\w+)\s.*relative error ([\d.]+)$", output_of("training_loop.py"), re.M)
    )
    assert float(errors["oracle"]) <= float(errors["router"]) < 0.85 * float(errors["random"])
    assert float(errors["4"]) < float(errors["3"]) < float(errors["2"]) < 0.2
