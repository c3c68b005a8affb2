"""Qwen 3 mixtures of experts: Qwen 3's attention, every layer sparse."""

from __future__ import annotations

from fissile.families.base import Experts, Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    module="qwen3_moe",
    prefix="Qwen3Moe",
    attention_bias="config",
    qk_norm="head",
    defaults={"num_key_value_heads": 4, "moe_intermediate_size": 768},
    accepted={"decoder_sparse_step": (1, None), "mlp_only_layers": ([], None)},
    experts=Experts(default_count=128),
)
