"""A run that is killed again and again ends in the same bytes as one that is left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from fissile.io.manifest import check_manifest

SMALL = [
    "calibrate.tokens=4096",
    "calibrate.context=128",
    "calibrate.batch_tokens=1024",
    "extract.refine_tokens=1024",
    "route.steps=12",
    "route.batch_tokens=512",
    "recover.steps=6",
    "recover.checkpoint_every=2",
    "recover.batch_tokens=256",
    "recover.context=128",
    "quantize.tokens=1024",
    "evaluate.tokens=1200",
    "evaluate.context=128",
    "evaluate.shares=[0.5]",
    "evaluate.controls=[static, pregate]",
    "evaluate.baselines=[rtn]",
    "limits.max_ppl_ratio=null",
]
START_UP = 3.0
"""Seconds before the first stage begins; most kills should come later."""


@dataclass(frozen=True)
class Job:
    """A run that can be started any number of times."""

    model: Path
    sets: list[str]

    def start(self, out: Path, *extra: str) -> subprocess.Popen[bytes]:
        base = [sys.executable, "-m", "fissile", "run", "demo/moe-nested", "-q"]
        words = [*base, "--model", str(self.model), "--out", str(out), *self.sets, *extra]
        paths = os.pathsep.join(sys.path)
        return subprocess.Popen(
            words,
            env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def finish(self, out: Path) -> None:
        assert self.start(out, *(["--resume"] if out.exists() else [])).wait() == 0


def assert_nothing_half_written(out: Path) -> None:
    if (out / "model").exists():
        assert check_manifest(out / "model") == []
    for unit in out.rglob("journal/**/*.safetensors"):
        with safe_open(unit, framework="pt") as file:
            assert file.keys() is not None


def compare(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    different = [n for n in names if (one / n).read_bytes() != (other / n).read_bytes()]
    assert not different


def kill_and_compare(job: Job, folder: Path, kills: int, seed: int) -> None:
    """Kill a run at `kills` random moments, resume it after each, compare with a calm run."""
    calm, rough = folder / "calm", folder / "rough"
    started = time.monotonic()
    job.finish(calm)
    whole = time.monotonic() - started
    dice = random.Random(seed)
    done = 0
    while done < kills:
        process = job.start(rough, *(["--resume"] if rough.exists() else []))
        # About as many equal shares of the work as kills, so that they spread over all stages.
        delay = START_UP + dice.uniform(0.0, 2.5 * max(1.0, whole - START_UP) / kills)
        try:
            code = process.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            assert_nothing_half_written(rough)
            continue
        # It finished before the kill: the rest of the kills hit a new run from the beginning.
        assert code == 0
        compare(calm / "model", rough / "model")
        rough = rough.with_name(f"{rough.name}-again")
    job.finish(rough)
    compare(calm / "model", rough / "model")


def test_three_kills(tiny_model: Path, small_recipe: list[str], tmp_path: Path) -> None:
    kill_and_compare(Job(tiny_model, small_recipe), tmp_path, kills=3, seed=5)


@pytest.mark.slow
def test_twenty_kills_of_the_demo(demo_model: Path, tmp_path: Path) -> None:
    sets = [part for item in SMALL for part in ("--set", item)]
    kill_and_compare(Job(demo_model, sets), tmp_path, kills=20, seed=11)
