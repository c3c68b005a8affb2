"""A run that is killed twenty times ends in the same bytes as one that is left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

import fissile
from fissile.io.manifest import check_manifest

MODEL = Path(fissile.__file__).resolve().parent / "recipes" / "demo" / "model"
SMALL = [
    "calibrate.tokens=4096",
    "calibrate.context=128",
    "calibrate.batch_tokens=1024",
    "route.steps=12",
    "route.batch_tokens=512",
    "recover.steps=6",
    "recover.checkpoint_every=2",
    "recover.batch_tokens=256",
    "recover.context=128",
    "quantize.tokens=1024",
    "evaluate.tokens=1200",
    "evaluate.context=128",
    "evaluate.shares=[0.75]",
    "evaluate.controls=[static, pregate]",
    "evaluate.baselines=[rtn]",
    "limits.max_ppl_ratio=null",
]
KILLS = 20
START_UP = 3.0
"""Seconds before the first stage begins; most kills should come later."""


def command(out: Path, *extra: str) -> list[str]:
    sets = [part for item in SMALL for part in ("--set", item)]
    base = [sys.executable, "-m", "fissile", "run", "demo/moe-nested", "-q"]
    return [*base, "--model", str(MODEL), "--out", str(out), *sets, *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}


def finish(out: Path, *extra: str) -> None:
    done = subprocess.run(
        command(out, *extra), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def assert_nothing_half_written(out: Path) -> None:
    if (out / "model").exists():
        assert check_manifest(out / "model") == []
    for unit in out.rglob("journal/**/*.safetensors"):
        with safe_open(unit, framework="pt") as file:
            assert file.keys() is not None


@pytest.mark.slow
@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="no demo model here")
def test_killed_runs_end_in_the_same_bytes(tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    started = time.monotonic()
    finish(calm)
    whole = time.monotonic() - started
    dice = random.Random(11)
    kills = 0
    while kills < KILLS:
        flags = ["--resume"] if rough.exists() else []
        process = subprocess.Popen(
            command(rough, *flags),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # About twenty equal shares of the work, so that the kills spread over all stages.
        delay = START_UP + dice.uniform(0.0, 2.5 * max(1.0, whole - START_UP) / KILLS)
        try:
            code = process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert_nothing_half_written(rough)
            continue
        # It finished before the kill: the rest of the kills hit a second run from the beginning.
        assert code == 0
        compare(calm / "model", rough / "model")
        rough = rough.with_name(f"{rough.name}-again")
    finish(rough, *(["--resume"] if rough.exists() else []))
    compare(calm / "model", rough / "model")


def compare(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    different = [n for n in names if (one / n).read_bytes() != (other / n).read_bytes()]
    assert not different
