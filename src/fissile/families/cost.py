"""What a model and its router cost per token, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from fissile.families.artifact import float_shapes
from fissile.families.checks import find
from fissile.families.table import dims_of

EMBEDDINGS = ("model.embed_tokens.weight", "model.router.embed_tokens.weight")
"""Tables that are looked up, not multiplied."""


@dataclass(frozen=True)
class Cost:
    """Size and work.

    Attributes:
        parameters: stored numbers; a tied head counts once.
        macs: multiply-accumulates of the weights per token, in the mean. Attention scores, which
            grow with the context, and elementwise work are left out.
    """

    parameters: int
    macs: float


def model_cost(config: Mapping[str, Any]) -> Cost:
    """Cost of a dense or routed model: of each layer's experts `top_k` are computed; with the head.

    Args:
        config: of a Fissile model, e.g. `FissileConfig.to_dict()` or an artifact's config.json.

    Raises:
        UnsupportedModel: the backbone is of no known family.
        CorruptCheckpoint: `routing` is malformed.
    """
    family = find(config)
    dims = dims_of(family, config)
    cost = _cost(config, dict(float_shapes(family, config)))
    head = dims.vocab * dims.hidden if dims.tied else 0
    return Cost(cost.parameters, cost.macs + head)


def router_cost(config: Mapping[str, Any]) -> Cost:
    """Cost of whatever chooses experts: the router before layer 0, or the selectors of all layers.

    Zero of both for a dense or static model. A share to report is that of `model_cost`, which
    includes the router.

    Args:
        config: see `model_cost`.

    Raises:
        UnsupportedModel: the backbone is of no known family.
        CorruptCheckpoint: `routing` is malformed.
    """
    shapes = dict(float_shapes(find(config), config))
    own = {n: s for n, s in shapes.items() if n.startswith("model.router.") or ".selector." in n}
    return _cost(config, own)


def _cost(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Cost:
    routing = config.get("routing")
    macs = 0.0
    for name, shape in shapes.items():
        if len(shape) < 2 or name in EMBEDDINGS or name.endswith("balance"):
            continue
        share = 1.0
        if ".mlp.experts." in name:
            share = routing["top_k"] / routing["num_experts"] if routing else 1.0
        elif ".mlp.pool." in name and routing:
            layer = int(name.removeprefix("model.layers.").partition(".")[0])
            share = _pool_share(routing, layer)
        macs += share * prod(shape)
    return Cost(sum(prod(shape) for shape in shapes.values()), macs)


def _pool_share(routing: Mapping[str, Any], layer: int) -> float:
    """Share of the overlapping experts' neurons that a token needs, counted with repeats."""
    blocks = routing["blocks"][layer]
    members = sum(size * len(experts) for size, experts in blocks) / routing["num_experts"]
    return min(1.0, routing["top_k"] * members / max(1, sum(size for size, _ in blocks)))
