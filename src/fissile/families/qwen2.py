"""Qwen 2 and 2.5: a bias on q, k and v."""

from __future__ import annotations

from fissile.families.base import Family

QWEN2 = Family(
    name="qwen2",
    model_types=("qwen2",),
    module="qwen2",
    prefix="Qwen2",
    attention_bias="qkv",
    mixed_attention=True,
    defaults={"num_key_value_heads": 32},
)
