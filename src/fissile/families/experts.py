"""Mixtures of experts that are sources: sizes of their experts, and their routing in our words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fissile.errors import UnsupportedModel
from fissile.families.base import Experts, Family

STOCK_FIELDS = (
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
)
"""Fields of stock configurations that `routing` replaces, or that matter to training alone."""


@dataclass(frozen=True)
class StockExperts:
    """Sizes of a layer of a stock mixture of experts.

    Args:
        count: experts E.
        top_k: chosen per token, K.
        size: neurons of an expert, M.
        shared: neurons that are always computed, S; 0 without a shared expert.
        normalize: the weights of the chosen experts sum to one.
    """

    count: int
    top_k: int
    size: int
    shared: int
    normalize: bool

    @property
    def neurons(self) -> int:
        """All neurons of a layer, S + E * M."""
        return self.shared + self.count * self.size


def stock_experts(family: Family, config: Mapping[str, Any]) -> StockExperts | None:
    """Experts that a stock config.json describes; None for a dense family.

    Raises:
        UnsupportedModel: a size is no positive integer, or more experts are chosen than there are.
    """
    layout = family.experts
    if layout is None:
        return None
    count = _count("num_experts", _first(config, layout))
    top_k = _count("num_experts_per_tok", config.get("num_experts_per_tok", layout.default_top_k))
    if top_k > count:
        raise UnsupportedModel(
            f"config.json: num_experts_per_tok is {top_k}, there are {count} experts"
        )
    shared = 0
    if layout.shared:
        shared = _sized(family, config, "shared_expert_intermediate_size")
    normalize = layout.normalize == "always" or bool(config.get("norm_topk_prob"))
    return StockExperts(count, top_k, _sized(family, config, layout.size), shared, normalize)


def routed_fields(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Fissile configuration that stand for a stock mixture of experts.

    Empty for a dense family. `intermediate_size` becomes that of the whole layer, which the shared
    neurons and all experts make up, as in a model that was converted.

    Raises:
        UnsupportedModel: as `stock_experts`.
    """
    found = stock_experts(family, config)
    if found is None:
        return {}
    layers = config["num_hidden_layers"]
    routing = {
        "kind": "layerwise",
        "num_experts": found.count,
        "top_k": found.top_k,
        "shared_sizes": [found.shared] * layers,
        "expert_sizes": [found.size] * layers,
        "per_layer": False,
        "layout": "disjoint",
        "shared_bias": False,
        "selector": "softmax",
        "normalize": found.normalize,
    }
    if found.shared:
        routing["shared_gate"] = True
    return {"intermediate_size": found.neurons, "routing": routing}


def _first(config: Mapping[str, Any], layout: Experts) -> Any:
    given = [config[name] for name in layout.counts if name in config]
    return given[0] if given else layout.default_count


def _sized(family: Family, config: Mapping[str, Any], name: str) -> int:
    return _count(name, config.get(name, family.defaults.get(name)))


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UnsupportedModel(f"config.json: {name} is {value!r}, accepted: a positive integer")
    return value
