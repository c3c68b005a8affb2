"""Which kernel a product gets, and how it is cut: tables by GPU and Triton version, in JSON.

`tuning/<gpu>-triton-<minor>.json` holds what `fissile bench kernels --set tune=true` measured on
that GPU; without one, `tuning/default.json` speaks, which was never timed. Nothing is tried out
while a model serves.

A table: {"gpu", "triton", "command", "measured" (a date, or null), "decode_rows", "scratch_rows",
"skipped" (what did not fit, and why), "entries": [{"kind", "bits", "group", "rows", "block_m",
"block_n", "num_warps", "num_stages", "split"}]}. An entry holds up to `rows` rows per expert, the
first that fits is taken.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from fissile.kernels.defaults import (
    Kind,
    LaunchConfig,
    config_of,
    default_config,
    narrowed,
    planned_config,
)
from fissile.kernels.route import RoutePlan
from fissile.kernels.tiles import TILE_ROWS, TiledWeight

Method = Literal["decode", "prefill", "scratch"]
FOLDER = Path(__file__).parent / "tuning"
_NUMBERS = ("block_m", "block_n", "num_warps", "num_stages", "split")


@dataclass(frozen=True)
class Table:
    """Launch configurations of one GPU and Triton version.

    Attributes:
        name: of its file.
        decode_rows: rows per expert up to which the decode kernels run.
        scratch_rows: rows per expert from which decoding to scratch is faster.
        entries: (kind, bits, group size, rows at most, configuration), in order.
        measured: when, or None for a table that nobody timed.
    """

    name: str
    decode_rows: int
    scratch_rows: int
    entries: tuple[tuple[Kind, int, int, int, LaunchConfig], ...]
    measured: str | None


def table_name(gpu: str, triton: str) -> str:
    """File name of the table of a GPU, e.g. "nvidia-h100-80gb-hbm3-triton-3.6"."""
    minor = ".".join(triton.split(".")[:2])
    return f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}-triton-{minor}"


def parse_table(name: str, fields: dict[str, Any]) -> Table:
    """A table from its JSON.

    Raises:
        KeyError: a field is missing.
    """
    entries = []
    for entry in fields["entries"]:
        block_m, block_n, num_warps, num_stages, split = (int(entry[key]) for key in _NUMBERS)
        config = LaunchConfig(block_m, block_n, num_warps, num_stages, split)
        bits, group, most = (int(entry[key]) for key in ("bits", "group", "rows"))
        entries.append((entry["kind"], bits, group, most, config))
    rows = int(fields["decode_rows"]), int(fields["scratch_rows"])
    return Table(name, *rows, tuple(entries), fields["measured"])


@lru_cache
def load_table(gpu: str | None, triton: str | None) -> Table:
    """The table for a GPU and Triton version, or the default.

    Args:
        gpu: its name; None for the default.
        triton: version of the installed Triton.
    """
    names = [table_name(gpu, triton)] if gpu and triton else []
    for name in (*names, "default"):
        path = FOLDER / f"{name}.json"
        if path.is_file():
            return parse_table(name, json.loads(path.read_text("utf-8")))
    raise FileNotFoundError(f"{FOLDER / 'default.json'}: not installed")


def triton_version() -> str | None:
    """Version of the installed Triton (or its CUDA/ROCm build); None without one."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@lru_cache
def current_table() -> Table:
    """The table of this process's GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return load_table(gpu, triton_version())


def choose_method(rows: int, bits: int, table: Table | None = None) -> Method:
    """Which kind of kernel multiplies so many rows per expert.

    Args:
        rows: in the mean.
        bits: of the weight.
        table: default that of this GPU.
    """
    table = table or current_table()
    if rows <= table.decode_rows:
        return "decode"
    return "prefill" if rows < table.scratch_rows else "scratch"


def choose_config(
    kind: Kind,
    weight: TiledWeight,
    rows: int,
    plan: RoutePlan | None = None,
    table: Table | None = None,
    *,
    whole: bool = False,
) -> LaunchConfig:
    """How a product is cut.

    Args:
        kind: "decode" or "prefill".
        weight: its width and size are looked at.
        rows: per expert, in the mean.
        plan: of the step, if experts are chosen.
        table: default that of this GPU.
        whole: no parts of the inputs, whose sum would take one launch more.
    """
    table = table or current_table()
    row_tiles, blocks = weight.codes.shape[1:3]
    tuned = [
        found
        for entry_kind, bits, group, most, found in table.entries
        if (entry_kind, bits, group) == (kind, weight.kernel_bits, weight.group_size)
        and rows <= most
    ]
    config = tuned[0] if tuned else planned_config(kind, plan, rows, weight)
    if plan is not None and plan.block != config.block_m:
        fitting = config_of(kind, weight.kernel_bits, plan.block, weight.group_size)
        config = replace(fitting, split=config.split)
    tiles = -(-rows // config.block_m) if plan is None else len(plan.tile_expert)
    if whole and kind == "decode":
        return narrowed(config, weight, tiles, processors())
    if kind == "decode" and not tuned:
        programs = row_tiles * (TILE_ROWS // config.block_n)
        config = replace(config, split=split_for(programs, tiles, blocks, processors()))
    return replace(config, split=max(1, min(config.split, blocks)))


def plan_block(bits: int, rows: int, table: Table | None = None) -> int:
    """Rows of a tile of a routing plan, which all layers of a step share, whatever their groups."""
    table = table or current_table()
    kind: Kind = "decode" if choose_method(rows, bits, table) == "decode" else "prefill"
    for entry_kind, entry_bits, _, most, found in table.entries:
        if entry_kind == kind and entry_bits == bits and rows <= most:
            return found.block_m
    return default_config(kind, bits, rows).block_m


@lru_cache
def processors() -> int:
    """Multiprocessors of this process's GPU; 1 without one."""
    if not torch.cuda.is_available():
        return 1
    return int(torch.cuda.get_device_properties().multi_processor_count)


def split_for(row_tiles: int, token_tiles: int, blocks: int, count: int) -> int:
    """Parts of the inputs so that the grid fills the GPU about twice.

    Args:
        row_tiles: tiles of rows.
        token_tiles: tiles of tokens.
        blocks: along the inputs; no part is shorter than two.
        count: processors of the GPU.
    """
    wanted = -(-2 * count // max(1, row_tiles * token_tiles))
    return max(1, min(wanted, blocks // 2, 8))
