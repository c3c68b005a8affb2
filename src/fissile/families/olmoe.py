"""OLMoE: norms before each half of a layer, and over the full width of q and k."""

from __future__ import annotations

from fissile.families.base import Experts, Family

OLMOE = Family(
    name="olmoe",
    model_types=("olmoe",),
    module="olmoe",
    prefix="Olmoe",
    attention_bias="config",
    qk_norm="full",
    accepted={"clip_qkv": (None,)},
    experts=Experts(default_count=64, size="intermediate_size"),
)
