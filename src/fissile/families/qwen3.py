"""Qwen 3 (dense): norms over each head of q and k, head size independent of the width."""

from __future__ import annotations

from fissile.families.base import Family

QWEN3 = Family(
    name="qwen3",
    model_types=("qwen3",),
    module="qwen3",
    prefix="Qwen3",
    attention_bias="config",
    qk_norm="head",
    mixed_attention=True,
    defaults={"num_key_value_heads": 32, "head_dim": 128},
)
