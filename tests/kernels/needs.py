"""What a proof of the kernels needs: absent where it must be present is a failure, no skip."""

from __future__ import annotations

import importlib.util
import platform
import sys

import pytest


def needs_triton() -> None:
    """Skip without Triton where it is not published; fail where the tests' extra installs it."""
    if importlib.util.find_spec("triton") is not None:
        return
    missing = "triton is not installed (pip install -e '.[dev]')"
    if sys.platform == "linux" and platform.machine() == "x86_64":
        pytest.fail(f"the kernels are not proved: {missing}")
    pytest.skip(missing)
