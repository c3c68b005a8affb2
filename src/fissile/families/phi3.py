"""Phi 3, 3.5 and 4: q, k, v in one linear, gate and up in another."""

from __future__ import annotations

from fissile.families.base import Family

PHI3 = Family(
    name="phi3",
    model_types=("phi3",),
    module="phi3",
    prefix="Phi3",
    attention=(("qkv_proj",), ("o_proj",)),
    fused_gate_up=True,
)
