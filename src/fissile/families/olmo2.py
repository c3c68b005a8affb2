"""OLMo 2: norms after each half of a layer, and over the full width of q and k."""

from __future__ import annotations

from fissile.families.base import Family

OLMO2 = Family(
    name="olmo2",
    model_types=("olmo2",),
    module="olmo2",
    prefix="Olmo2",
    norm_layout="post",
    attention_bias="config",
    qk_norm="full",
)
