"""A table of launch configurations for this GPU and Triton: measured once, shipped, never at run.

Few candidates are tried per kind, width and number of rows, on the matrices of the benchmark's
shapes. The best has the least geometric mean of times. Where the decode kernels end and where
decoding to scratch begins is measured too.
"""

from __future__ import annotations

import datetime
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fissile.errors import UsageError
from fissile.io.publish import atomic_write_json
from fissile.kernels import launch
from fissile.kernels.configs import table_name, triton_version
from fissile.kernels.defaults import Kind, LaunchConfig, default_config
from fissile.kernels.tiles import TiledWeight
from fissile.refactor.training import Progress
from fissile.run.kernel_cases import Case, Shape
from fissile.run.kernel_timing import seconds_per_call, sets_needed

DECODE_ROWS = (1, 8, 16, 32, 64)
PREFILL_ROWS = (64, 128, 256, 1024)
_CROSSINGS = (512, 1024, 2048, 4096)
_NUMBERS = ("block_m", "block_n", "num_warps", "num_stages", "split")
Run = Callable[[Tensor, TiledWeight], Tensor]


class Settings(Protocol):
    """What tuning reads of the benchmark's settings."""

    @property
    def bits(self) -> tuple[int, ...]: ...
    @property
    def group_size(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def memory_gb(self) -> float: ...
    @property
    def seed(self) -> int: ...


def tune(folder: str, settings: Settings, shapes: Sequence[Shape], progress: Progress) -> Path:
    """Measure candidates and write the table.

    Args:
        folder: of tables, `kernels/tuning` of the source tree for instance.
        settings: of the benchmark.
        shapes: the matrices among them are measured.
        progress: called as ("tune", done, total, detail).

    Returns:
        The table's file; its name says the GPU and the Triton version.

    Raises:
        UsageError: no folder, no Triton, or no matrix among the shapes.
    """
    version = triton_version()
    matrices = [shape for shape in shapes if shape.kind == "linear"]
    if not Path(folder).is_dir() or version is None or not matrices:
        raise UsageError(f"tune={folder}: needs the folder, Triton, and a matrix among the shapes")
    gpu, entries, skipped = torch.cuda.get_device_name(), [], []
    jobs: list[tuple[Kind, int]] = [("decode", r) for r in DECODE_ROWS]
    jobs += [("prefill", r) for r in PREFILL_ROWS]
    total, found = len(jobs) * len(settings.bits), 0
    for bits in settings.bits:
        for kind, rows in jobs:
            measured = _Measure(settings, matrices, bits, rows)
            where = {"kind": kind, "bits": bits, "group": settings.group_size, "rows": rows}
            best, without = fastest(
                kind, candidates(kind, rows, bits, settings.group_size), measured
            )
            entries.append(where | _numbers(best))
            skipped += [where | _numbers(config) | {"reason": why} for config, why in without]
            found += 1
            progress("tune", found, total, f"{kind} {bits} bits, {rows} rows")
    table = {
        "gpu": gpu,
        "triton": version,
        "command": shlex.join(["fissile", *sys.argv[1:]]),
        "measured": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **_crossings(settings, matrices),
        "entries": entries,
        "skipped": skipped,
    }
    path = Path(folder) / f"{table_name(gpu, version)}.json"
    atomic_write_json(path, table)
    return path


def candidates(kind: Kind, rows: int, bits: int, group_size: int) -> list[LaunchConfig]:
    """At most seven configurations worth trying for so many rows per expert, the default first."""
    default = default_config(kind, bits, rows, group_size)
    block = default.block_m
    if kind == "prefill":
        cuts = ((8, 3), (8, 4), (4, 3), (4, 2))
        others = [LaunchConfig(block, 128, warps, stages) for warps, stages in cuts]
    else:
        warps = 4 if block <= 32 else 8
        others = [replace(default, split=split) for split in (2, 4, 8)]
        others += [LaunchConfig(block, 128, warps, stages, 2) for stages in (3, 4)]
        others.append(LaunchConfig(block, 64, 4, 3, 2))
    return list(dict.fromkeys([default, *others]))


def fastest(
    kind: Kind, tried: Sequence[LaunchConfig], measured: Callable[[Run], float]
) -> tuple[LaunchConfig, list[tuple[LaunchConfig, str]]]:
    """The configuration of least time, and those that do not fit the GPU with the reason.

    Args:
        kind: of kernel.
        tried: configurations.
        measured: seconds of one way to multiply.

    Raises:
        UsageError: none of them fits.
    """
    from triton.runtime.errors import OutOfResources

    times: list[tuple[float, LaunchConfig]] = []
    without: list[tuple[LaunchConfig, str]] = []
    for config in tried:
        try:
            times.append((measured(_runner(kind, config)), config))
        except OutOfResources as err:
            without.append((config, " ".join(str(err).split())))
    if not times:
        raise UsageError(f"tune: no configuration fits this GPU: {without[0][1]}")
    return min(times, key=lambda found: found[0])[1], without


def _numbers(config: LaunchConfig) -> dict[str, int]:
    return {key: asdict(config)[key] for key in _NUMBERS}


class _Measure:
    """Geometric mean of the times of one way to multiply, over matrices."""

    def __init__(self, settings: Settings, matrices: Sequence[Shape], bits: int, rows: int) -> None:
        self.repeats, self.sets = settings.repeats, []
        for shape in matrices:
            size = int(shape.held() * (bits + 32 / settings.group_size) / 8)
            memory = int(settings.memory_gb * 1e9) // len(matrices)
            count = sets_needed(size, size, "cuda", memory)
            case = Case(shape, rows, bits, settings.group_size, "cuda", count, settings.seed)
            held = [case.weight((shape.rows, shape.inputs), 2 + i) for i in range(count)]
            self.sets.append((case.activations(), held))

    def __call__(self, run: Run) -> float:
        logs = []
        for x, held in self.sets:
            calls = [partial(run, x, w) for w in held]
            logs.append(math.log(seconds_per_call(calls, self.repeats)[0]))
        return math.exp(sum(logs) / len(logs))


def _runner(kind: Kind, config: LaunchConfig) -> Run:
    product = launch.decode_dense if kind == "decode" else launch.prefill_dense

    def run(x: Tensor, weight: TiledWeight) -> Tensor:
        return product(x, weight, config=config)

    return run


def _scratch(x: Tensor, weight: TiledWeight) -> Tensor:
    return torch.nn.functional.linear(x, launch.dequantize_rows(weight, x.dtype, expert=0))


def _crossings(settings: Settings, matrices: Sequence[Shape]) -> dict[str, int]:
    """Rows at which one kind of kernel gives way to the next, at four bits."""
    bits = 4 if 4 in settings.bits else settings.bits[0]

    def least(kind: Kind, measured: _Measure, rows: int) -> float:
        tried = candidates(kind, rows, bits, settings.group_size)
        return measured(_runner(kind, fastest(kind, tried, measured)[0]))

    decode_rows = 16
    for rows in (32, 64):
        measured = _Measure(settings, matrices, bits, rows)
        if least("decode", measured, rows) <= least("prefill", measured, rows):
            decode_rows = rows
    scratch_rows = _CROSSINGS[-1]
    for rows in reversed(_CROSSINGS):
        measured = _Measure(settings, matrices, bits, rows)
        if measured(_scratch) > least("prefill", measured, rows):
            break
        scratch_rows = rows
    return {"decode_rows": decode_rows, "scratch_rows": scratch_rows}
