"""Llama 2 and 3, and the many models that use its class (SmolLM, TinyLlama, Yi, ...)."""

from __future__ import annotations

from fissile.families.base import Family

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    module="llama",
    prefix="Llama",
    attention_bias="config",
    accepted={"mlp_bias": (False, None)},
)
