"""Qwen 1.5 and 2 mixtures of experts: a bias on q, k and v, and a gated shared expert."""

from __future__ import annotations

from fissile.families.base import Experts, Family

QWEN2_MOE = Family(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    module="qwen2_moe",
    prefix="Qwen2Moe",
    attention_bias="qkv",
    mixed_attention=True,
    defaults={
        "num_key_value_heads": 16,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    accepted={
        "qkv_bias": (True, None),
        "decoder_sparse_step": (1, None),
        "mlp_only_layers": ([], None),
    },
    experts=Experts(default_count=60, default_top_k=4, shared=True),
)
