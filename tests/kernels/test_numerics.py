"""The kernels' results, proved in Triton's interpreter by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.kernels.needs import needs_triton

ROOT = Path(__file__).resolve().parents[2]


def test_kernels_equal_float64_in_the_interpreter(finished_run: Path) -> None:
    needs_triton()
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *(
                "--import-mode=importlib",
                "--durations=5",
                "tests/kernels/interpreted.py",
                "tests/kernels/interpreted_access.py",
            ),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": path,
            "FISSILE_TEST_MODEL": str(finished_run),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
