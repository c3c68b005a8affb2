"""Neurons of a converted layer as pieces of a host's gate, up and down projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fissile.export.pieces import Piece


def expert_rows(config: Mapping[str, Any]) -> list[list[int]]:
    """Neurons of every expert of every layer."""
    routing = config["routing"]
    if routing["layout"] == "disjoint":
        return [[size] * routing["num_experts"] for size in routing["expert_sizes"]]
    return [
        [sum(s for s, members in blocks if e in members) for e in range(routing["num_experts"])]
        for blocks in routing["blocks"]
    ]


def add_shared(pieces: dict[str, list[Piece]], mlp: str, factor: float) -> None:
    """Shared neurons of `mlp` as the first ones of an FFN; `factor` of the down projection."""
    for part in ("gate", "up"):
        pieces[part].append(Piece(f"{mlp}.shared.{part}_proj.weight"))
    pieces["down"].append(Piece(f"{mlp}.shared.down_proj.weight", factor=factor))


def add_expert(
    pieces: dict[str, list[Piece]],
    mlp: str,
    routing: Mapping[str, Any],
    layer: int,
    expert: int,
    size: int,
    at: int,
    factor: float,
) -> None:
    """Neurons of one expert, placed behind the `at` neurons that are there already."""
    if routing["layout"] == "disjoint":
        stack = f"{mlp}.experts.gate_up_proj"
        pieces["gate"].append(Piece(stack, at=(at, 0), rows=(0, size), index=expert))
        pieces["up"].append(Piece(stack, at=(at, 0), rows=(size, 2 * size), index=expert))
        down = Piece(f"{mlp}.experts.down_proj", at=(0, at), index=expert, factor=factor)
        pieces["down"].append(down)
        return
    begin = 0
    for rows, members in routing["blocks"][layer]:
        if expert in members:
            taken = (begin, begin + rows)
            for part in ("gate", "up"):
                pieces[part].append(Piece(f"{mlp}.pool.{part}_proj.weight", (at, 0), rows=taken))
            down = Piece(f"{mlp}.pool.down_proj.weight", (0, at), columns=taken, factor=factor)
            pieces["down"].append(down)
            at += rows
        begin += rows
