"""What a model's experts weigh and cost, from the headers of its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from fissile.errors import UnsupportedModel
from fissile.families.artifact import tied_base
from fissile.io.headers import open_checkpoint_headers
from fissile.serve.trace import ModelShape

_NESTED = re.compile(r"\.(plane|theta|tied)_(\d+)$")


def model_shape(folder: Path, layers: Sequence[int], experts: int, top_k: int) -> ModelShape:
    """Sizes of a model from the headers of its files; bytes are those stored.

    Args:
        folder: an artifact or a mixture of experts of transformers.
        layers: numbers of those that have experts.
        experts: routed experts of a layer.
        top_k: experts of a token, at most.

    Raises:
        UnsupportedModel: a layer without tensors of experts.
        CorruptCheckpoint: headers that do not parse.
    """
    headers = open_checkpoint_headers(folder)
    planes: dict[int, dict[int, int]] = {layer: {} for layer in layers}
    count = {"expert": 0.0, "rest": 0.0, "bytes": 0.0}
    share = _member_share(headers.config, experts)
    entry = headers.config.get("nested") or {}
    for name, (_, info) in headers.tensors.items():
        number = re.search(r"\.(\d+)\.", name)
        layer = int(number.group(1)) if number else -1
        if layer not in planes:
            continue
        nested = _NESTED.search(name)
        # Four weights lie in a byte of the base plane; other planes and floats hold none more.
        weights = prod(info.shape)
        if nested is not None:
            weights = 4 * info.nbytes if nested.group(0) == ".plane_2" else 0
        if ".experts." in name or ".mlp.pool." in name:
            plane = _plane(nested, entry) if nested else 0
            part = share if ".mlp.pool." in name else 1 / experts
            planes[layer][plane] = planes[layer].get(plane, 0) + round(info.nbytes * part)
            count["expert"] += weights * part
        else:
            count["rest"] += weights
            count["bytes"] += info.nbytes
    rows = [tuple(size for _, size in sorted(row.items())) for row in planes.values()]
    if not all(rows):
        raise UnsupportedModel(
            f"{folder}: no tensors of the experts of layer {layers[rows.index(())]}"
        )
    text = headers.config.get("text_config") or headers.config
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads") or 0
    wide = text.get("head_dim") or text.get("hidden_size", 0) // max(
        1, text.get("num_attention_heads") or 1
    )
    depth, place = len(rows), folder.resolve()
    if place.name == "model":  # inside a run folder, which has the name
        place = place.parent
    return ModelShape(
        name=place.name,
        layers=depth,
        experts=experts,
        top_k=top_k,
        planes=tuple(rows) if len(set(rows)) > 1 else (rows[0],),
        expert_flops=2 * count["expert"] / depth,
        layer_bytes=count["bytes"] / depth,
        layer_flops=2 * count["rest"] / depth,
        kv_bytes=4.0 * heads * wide,
    )


def _plane(part: re.Match[str], entry: Mapping[str, Any]) -> int:
    """Place in load order of the plane that a part of a nested weight is read with."""
    # Floats that narrower widths are tied to are needed with the first.
    first = f".theta_{tied_base(entry['widths'])}" if entry.get("tied") else None
    return 0 if part.group(0) == first else int(part.group(2)) - 2


def _member_share(config: dict[str, Any], experts: int) -> float:
    """Mean share of a pool of neurons that an expert of overlapping ones takes."""
    blocks = (config.get("routing") or {}).get("blocks")
    if not blocks:
        return 1.0
    sizes = [sum(size for size, _ in layer) for layer in blocks]
    taken = [sum(size * len(members) for size, members in layer) for layer in blocks]
    return sum(taken) / sum(sizes) / experts
