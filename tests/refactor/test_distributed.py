"""Two processes make what one process makes, and one of them writes and speaks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.refactor import failing, sharded
from torch import Tensor

from fissile.io.units import UnitStore
from fissile.quant.layers import read_layer
from fissile.workers import Workers

Words = list[str | Path]
ACCELERATE: Words = ["accelerate.commands.launch", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN: Words = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def launch(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Start a command line in two processes; without GPUs they talk over gloo."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def assert_same_training(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Files of `training.train` hold the same but for rounding."""
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
            apart = (one[name] - two[name]).abs() > 1e-5
            assert float(apart.float().mean()) < 0.02, name
    moved = [name for name in one if name.startswith("mean.") and one[name].abs().max() > 0]
    assert len(moved) > 5


def test_two_processes_make_what_one_does(
    finished_run: Path, tiny_model: Path, small_recipe: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base: Words = ["run", "demo/moe-nested", "--model", tiny_model, "--out", out, *small_recipe]
    base += ["--stop-after", "quantize", "--json"]
    done = launch(*ACCELERATE, "--multi_gpu", "-m", "fissile", *base)
    assert done.returncode == 0, done.stderr
    # One summary, one voice: the other process keeps silent.
    assert done.stdout.count('"stages"') == 1
    for line in ("route 4/4  loss", "recover 2/2  loss", "quantize 2/2  relative"):
        assert done.stderr.count(line) == 1
    for name in ("route/router_training", "recover/training"):
        one, two = (load_file(run / f"journal/{name}.safetensors") for run in (finished_run, out))
        assert_same_training(one, two)
    assert list(out.glob("journal/recover/model/*.safetensors"))
    # What the other process had to know of the router is gone.
    assert [*(out / "journal/route").glob("*lesson*")] == []
    stores = [UnitStore(run / "journal/quantize") for run in (finished_run, out)]
    for i in range(2):
        ours, theirs = (read_layer(store, i) for store in stores)
        assert ours.events == theirs.events
        assert any(".experts." in name for name in ours.losses)
        for name, losses in ours.losses.items():
            assert theirs.losses[name] == pytest.approx(losses, rel=0.02), name


def test_weights_cut_over_processes_train_as_whole_ones(tiny_model: Path, tmp_path: Path) -> None:
    cut = ["--use_fsdp", "--fsdp_version", "2"]
    script = str(sharded.__file__)
    done = launch(*ACCELERATE, *cut, script, tiny_model, tmp_path)
    assert done.returncode == 0, done.stderr
    whole = sharded.trained(tiny_model, Workers(), tmp_path / "whole.safetensors")
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "training"))
    assert_same_training(one, two)
    first, second = (load_file(tmp_path / f"model_{rank}.safetensors") for rank in (0, 1))
    curve = torch.tensor([*whole.curve, whole.before, whole.after])
    torch.testing.assert_close(first.pop("curve"), curve, rtol=1e-5, atol=0)
    torch.testing.assert_close(first.pop("norms"), torch.tensor(whole.norms), rtol=1e-3, atol=0)
    # The load-balance term of a router is no mean over parts of a batch.
    router = torch.tensor(sharded.routed(tiny_model, Workers()).curve)
    torch.testing.assert_close(first.pop("router"), router, rtol=1e-5, atol=0)
    state = whole.model.state_dict()
    assert {*first} == {*state} - {"lm_head.weight"}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        # Adam's steps are of the size of the rate, whatever the gradient.
        assert float((tensor - state[name]).abs().max()) < 5e-3, name


def test_a_process_that_fails_ends_all_with_one_line(
    finished_run: Path, tiny_model: Path, small_recipe: list[str], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished_run, tmp_path / "out"))
    (out / "journal/quantize.json").unlink()
    shutil.rmtree(out / "journal/quantize")
    words: Words = ["run", "demo/moe-nested", "--model", tiny_model, "--out", out, *small_recipe]
    began = time.monotonic()
    done = launch(*TORCHRUN, str(failing.__file__), *words, "--resume")
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("fissile: ")]
    assert lines == ["fissile: error: process 1 of 2: made to fail"]
    # Nobody waited until somebody's patience was over.
    assert time.monotonic() - began < 120
    assert not (out / "journal/quantize.json").exists()
