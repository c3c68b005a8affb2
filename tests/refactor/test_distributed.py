"""Two processes under `accelerate launch` train what one process trains, and one of them writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

LAUNCH = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]


def launch(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Start a command line in two processes; without GPUs they talk over gloo."""
    base = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *LAUNCH]
    return subprocess.run(
        [*base, "--dynamo_backend", "no", "-m", "fissile", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_two_processes_train_what_one_does(
    finished_run: Path, tiny_model: Path, small_recipe: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base: list[str | Path] = [
        "run",
        "demo/moe-nested",
        "--model",
        tiny_model,
        "--out",
        out,
        *small_recipe,
    ]
    done = launch(*base, "--stop-after", "recover", "--json")
    assert done.returncode == 0, done.stderr
    # One summary, one voice: the other process keeps silent.
    assert done.stdout.count('"stages"') == 1
    assert done.stderr.count("recover 2/2  loss") == 1
    one, two = (
        load_file(run / "journal/recover/training.safetensors") for run in (finished_run, out)
    )
    assert one.keys() == two.keys()
    torch.testing.assert_close(one["losses"], two["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(one["norms"], two["norms"], rtol=1e-3, atol=0)
    for name in one:
        # Adam's first steps turn rounding into signs; its running mean of gradients does not. Sums
        # over tokens cancel, and their order follows the number of threads: a thousandth of the
        # largest gradient is rounding, while a share that is not averaged would be half of it.
        if name.startswith("mean."):
            scale = float(one[name].abs().max())
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-3 * scale)
        elif name.startswith("value."):
            far = (one[name] - two[name]).abs() > 1e-5
            assert float(far.float().mean()) < 0.02, name
    moved = [name for name in one if name.startswith("mean.") and one[name].abs().max() > 0]
    assert len(moved) > 10
    assert list(out.glob("journal/recover/model/*.safetensors"))
