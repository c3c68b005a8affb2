"""Gemma 3, text models: as Gemma 2 with q and k norms and a rotary embedding per attention type."""

from __future__ import annotations

from fissile.families.base import Family

GEMMA3 = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    module="gemma3",
    prefix="Gemma3",
    norm_layout="sandwich",
    attention_bias="config",
    qk_norm="head",
    activation_field="hidden_activation",
    activation="gelu_pytorch_tanh",
    defaults={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    accepted={"use_bidirectional_attention": (None, False)},
    mixed_attention=True,
    scaled_embedding=True,
    rotary_per_layer_type=True,
)
