"""Mistral 7B and its successors with the same class; all layers share one sliding window."""

from __future__ import annotations

from fissile.families.base import Family

MISTRAL = Family(
    name="mistral",
    model_types=("mistral",),
    module="mistral",
    prefix="Mistral",
    defaults={"num_key_value_heads": 8},
)
