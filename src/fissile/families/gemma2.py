"""Gemma 2: four norms a layer, scaled embeddings, soft-capped attention (hence no sdpa)."""

from __future__ import annotations

from fissile.families.base import Family

GEMMA2 = Family(
    name="gemma2",
    model_types=("gemma2",),
    module="gemma2",
    prefix="Gemma2",
    norm_layout="sandwich",
    attention_bias="config",
    activation_field="hidden_activation",
    activation="gelu_pytorch_tanh",
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    accepted={"use_bidirectional_attention": (None, False)},
    mixed_attention=True,
    scaled_embedding=True,
    sdpa=False,
)
