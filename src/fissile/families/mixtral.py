"""Mixtral: Mistral's attention, experts chosen by a softmax over all, renormalised."""

from __future__ import annotations

from fissile.families.base import Experts, Family

MIXTRAL = Family(
    name="mixtral",
    model_types=("mixtral",),
    module="mixtral",
    prefix="Mixtral",
    defaults={"num_key_value_heads": 8},
    experts=Experts(
        module="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        counts=("num_local_experts", "num_experts"),
        default_top_k=2,
        size="intermediate_size",
        normalize="always",
    ),
)
