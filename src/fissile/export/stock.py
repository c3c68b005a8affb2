"""Write a described model as a plain Hugging Face folder that needs no code of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fissile.export.card import gguf_card, stock_card
from fissile.export.folder import add_config, seal
from fissile.export.gguf_file import write_gguf
from fissile.export.pieces import Fetch, Lowered, materialise
from fissile.export.weights import Weights
from fissile.io.manifest import Origin
from fissile.io.publish import published
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter

SHARD_BYTES = 5_000_000_000


def write_stock(
    out: Path,
    lowered: Lowered,
    fetch: Fetch,
    *,
    source: Path,
    dtype: str,
    origin: Origin,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint of a stock class; it appears under its name complete, or not at all.

    Args:
        out: folder of the checkpoint.
        lowered: what it consists of.
        fetch: source names to float32 tensors.
        source: folder with the tokenizer.
        dtype: "float32" or "bfloat16".
        origin: recorded in the manifest.
        overwrite: replace an existing folder.

    Returns:
        The manifest.

    Raises:
        UsageError: the folder exists.
        ResourceError: the disk is full.
    """
    wanted = getattr(torch, dtype)
    plan = [
        PlannedTensor(t.name, "F32" if t.exact else DTYPE_NAMES[wanted], t.shape)
        for t in lowered.targets
    ]
    with published(out, overwrite=overwrite) as folder:
        with ShardWriter(folder, plan, SHARD_BYTES) as writer:
            for target in lowered.targets:
                tensor = materialise(target, fetch)
                writer.write(target.name, tensor.to(torch.float32 if target.exact else wanted))
        config = lowered.config | {"dtype": dtype}
        return finish_folder(folder, config, lowered.cost, source, origin)


def finish_folder(
    folder: Path, config: dict[str, Any], cost: Mapping[str, Any], source: Path, origin: Origin
) -> dict[str, Any]:
    """Add configuration, tokenizer, card and manifest to a folder of weights."""
    add_config(folder, config, source)
    return seal(folder, stock_card(config, cost, source.name), origin)


def write_gguf_folder(
    out: Path,
    lowered: Lowered,
    weights: Weights,
    *,
    dtype: str,
    codes: bool,
    origin: Origin,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write model.gguf with a card and a manifest beside it; arguments as `write_stock`.

    Args:
        codes: keep integer codes as Q4_1 where they fit bit for bit.
    """
    with published(out, overwrite=overwrite) as folder:
        name = weights.source.folder.name
        kinds = write_gguf(
            folder / "model.gguf", lowered, weights, dtype=dtype, codes=codes, name=name
        )
        text = gguf_card(lowered.config, {**lowered.cost, "tensors": kinds}, name)
        return seal(folder, text, origin)
