"""From a stock configuration to Fissile's, and from there to modules.

Shapes: L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from fissile.families.base import Family
from fissile.families.experts import STOCK_FIELDS, routed_fields
from fissile.models.configuration_fissile import FissileConfig, stock_class
from fissile.models.modeling_fissile import FissileDecoderLayer, FissileForCausalLM
from fissile.models.routers_fissile import router_block

DROPPED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "dtype",
    "torch_dtype",
)
"""Fields of the stock configuration that do not describe the backbone."""


def backbone_of(family: Family, activation: str) -> dict[str, Any]:
    """What the modeling file must know about a family, as stored in config.json."""
    return {
        "family": family.name,
        "module": family.module,
        "prefix": family.prefix,
        "norm_layout": family.norm_layout,
        "scaled_embedding": family.scaled_embedding,
        "rotary_per_layer_type": family.rotary_per_layer_type,
        "sdpa": family.sdpa,
        "attention": [list(group) for group in family.attention],
        "activation": activation,
    }


def dense_config(stock: dict[str, Any], family: Family) -> FissileConfig:
    """Describe a stock checkpoint of `family` as a Fissile model.

    A dense one has no routing; a mixture of experts has that of its own routers.

    Args:
        stock: contents of the checkpoint's config.json.
        family: the family it belongs to.
    """
    base: PretrainedConfig = AutoConfig.for_model(**stock)
    fields = {k: v for k, v in base.to_dict().items() if k not in DROPPED}
    layers = fields["num_hidden_layers"]
    types = fields.pop("layer_types", None)
    if types is None:
        windowed = getattr(base, "sliding_window", None) is not None
        types = ["sliding_attention" if windowed else "full_attention"] * layers
    if routed := routed_fields(family, stock):
        fields = {k: v for k, v in fields.items() if k not in STOCK_FIELDS} | routed
    activation = fields.get(family.activation_field) or family.activation
    return FissileConfig(
        backbone=backbone_of(family, activation),
        num_base_layers=layers,
        layer_types=types,
        **fields,
    )


def with_routing(config: FissileConfig, routing: dict[str, Any] | None) -> FissileConfig:
    """Copy of `config` with another routing; a router with attention adds its cache layer."""
    fields = config.to_dict()
    for name in (*DROPPED, "num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        fields.pop(name, None)
    layers = config.num_base_layers
    fields |= {"routing": routing, "num_hidden_layers": layers}
    fields["layer_types"] = fields["layer_types"][:layers]
    copy = FissileConfig(**fields)
    if router_block(copy) in (None, "token"):
        return copy
    fields["num_hidden_layers"] = layers + 1
    fields["layer_types"] = [*fields["layer_types"], "full_attention"]
    return FissileConfig(**fields)


def with_nested(
    config: FissileConfig, nested: dict[str, Any] | None, bits: int | None
) -> FissileConfig:
    """Copy of `config` whose listed weights are bit-nested, served at `bits`."""
    copy = with_routing(config, config.routing)
    copy.nested, copy.bits = nested, bits
    return copy


def empty_layer(config: FissileConfig, layer_idx: int) -> FissileDecoderLayer:
    """A decoder layer on the meta device; fill it with `load_state_dict(..., assign=True)`."""
    prepare_parts(config)
    with torch.device("meta"):
        return FissileDecoderLayer(config, layer_idx).eval()


def prepare_parts(config: FissileConfig) -> None:
    """Choose the implementations of attention and experts for modules built without a model."""
    if config._attn_implementation is None:
        config._attn_implementation = "sdpa" if config.backbone["sdpa"] else "eager"
    if config._experts_implementation is None:
        config._experts_implementation = "eager"


def empty_model(config: FissileConfig) -> FissileForCausalLM:
    """The whole model on the meta device, in evaluation mode."""
    with torch.device("meta"):
        return FissileForCausalLM(config).eval()


def rotary_of(config: FissileConfig) -> nn.Module:
    """The backbone's rotary embedding on the CPU (its buffers are computed, never stored)."""
    return stock_class(config, "RotaryEmbedding")(config)
