"""The families that exist, and the sizes a config gives a model of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fissile.errors import UnsupportedModel
from fissile.families.base import Dims, Family
from fissile.families.experts import stock_experts
from fissile.families.gemma2 import GEMMA2
from fissile.families.gemma3 import GEMMA3
from fissile.families.llama import LLAMA
from fissile.families.mistral import MISTRAL
from fissile.families.mixtral import MIXTRAL
from fissile.families.olmo2 import OLMO2
from fissile.families.olmoe import OLMOE
from fissile.families.phi3 import PHI3
from fissile.families.qwen2 import QWEN2
from fissile.families.qwen2_moe import QWEN2_MOE
from fissile.families.qwen3 import QWEN3
from fissile.families.qwen3_moe import QWEN3_MOE

_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2)
_MIXTURES = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE)
FAMILIES: Mapping[str, Family] = {family.name: family for family in (*_DENSE, *_MIXTURES)}

ARTIFACT_TYPE = "fissile"
"""`model_type` of our own artifacts; their family is named in config["backbone"]["family"]."""

SIZE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
"""Config fields without which no model can be built."""


def setting(family: Family, config: Mapping[str, Any], name: str) -> Any:
    """Value of a config field, or what the stock class puts in its place when it is left out."""
    if name in config:
        return config[name]
    return family.activation if name == family.activation_field else family.defaults.get(name)


def dims_of(family: Family, config: Mapping[str, Any]) -> Dims:
    """Sizes of the model that `config` describes; also of our own artifacts.

    Raises:
        UnsupportedModel: a size is missing or no positive integer.
    """
    hidden, ffn, layers, heads, vocab = (_count(name, config.get(name)) for name in SIZE_FIELDS)
    if config.get("model_type") == ARTIFACT_TYPE:
        # num_hidden_layers counts the router's cache layer too.
        layers = _count("num_base_layers", config.get("num_base_layers"))
    elif (experts := stock_experts(family, config)) is not None:
        ffn = experts.neurons
    kv_heads = setting(family, config, "num_key_value_heads")
    head_dim = setting(family, config, "head_dim")
    dims = Dims(
        hidden=hidden,
        ffn=ffn,
        layers=layers,
        heads=heads,
        kv_heads=heads if kv_heads is None else _count("num_key_value_heads", kv_heads),
        head_dim=hidden // heads if head_dim is None else _count("head_dim", head_dim),
        vocab=vocab,
        tied=bool(setting(family, config, "tie_word_embeddings")),
    )
    if heads % dims.kv_heads:
        raise UnsupportedModel(
            f"config.json: num_key_value_heads {dims.kv_heads} must divide the {heads} heads"
        )
    return dims


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise UnsupportedModel(f"config.json: {name} is {value!r}, accepted: a positive integer")
    return value
