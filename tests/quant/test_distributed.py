"""Two processes that share windows, rows and widths quantize as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.quant import ranks

from fissile.io.units import UnitStore
from fissile.quant.layers import QuantizedLayer, read_layer
from fissile.workers import Workers

LAYERS = 2


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Units of one process, and of two that talk over gloo."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for kind in ranks.KINDS:
        ranks.quantize(tiny_model, one, kind, Workers())
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    done = subprocess.run(
        [*launch, ranks.__file__, str(tiny_model), str(two)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return one, two


def both(folders: tuple[Path, Path], kind: str, i: int) -> tuple[QuantizedLayer, QuantizedLayer]:
    one, two = (read_layer(UnitStore(folder / kind), i) for folder in folders)
    assert one.parts.keys() == two.parts.keys()
    assert one.companding == two.companding
    return one, two


def far(one: QuantizedLayer, two: QuantizedLayer, name: str, bits: int) -> float:
    """Share of the weights that differ by more than rounding."""
    a, b = one.decode(name, bits), two.decode(name, bits)
    return float(((a - b).abs() > 0.01 * a.square().mean().sqrt()).float().mean())


def test_codes_and_floats_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    for i in range(LAYERS):
        one, two = both(folders, "fast", i)
        assert len(one.groups) == 7
        for name in one.groups:
            for bits in (2, 3, 4):
                # Sums in another order move a few weights that lie between two codes.
                assert far(one, two, name, bits) < 0.02, (i, name, bits)
                ours, theirs = one.losses[name][bits], two.losses[name][bits]
                assert theirs == pytest.approx(ours, rel=2e-3), (i, name, bits)
        for name, tensor in one.kept.items():
            torch.testing.assert_close(two.kept[name], tensor, rtol=1e-5, atol=1e-6)


def test_trained_blocks_with_every_option_are_those_of_one_process(
    folders: tuple[Path, Path],
) -> None:
    one, two = both(folders, "whole", 0)
    # What is solved before anything has been trained.
    for name in ("q_proj", "k_proj", "v_proj"):
        for bits in (2, 3):
            assert far(one, two, f"self_attn.{name}.weight", bits) < 0.05
    for i in range(LAYERS):
        one, two = both(folders, "whole", i)
        for name in one.groups:
            assert two.losses[name] == pytest.approx(one.losses[name], rel=0.02), (i, name)
        assert len(one.block) == len(two.block) == 4
        for ours, theirs in zip(one.block, two.block, strict=True):
            for before, after in zip(ours, theirs, strict=True):
                assert after == pytest.approx(before, rel=0.02), i
        assert one.sensitivity.keys() == two.sensitivity.keys() != set()
        for name, errors in one.sensitivity.items():
            assert two.sensitivity[name] == pytest.approx(errors, rel=0.02), (i, name)
