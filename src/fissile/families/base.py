"""What a model family is: typed data about names, norms, biases and config fields.

A family file holds no code. What is computed from a family lives in names.py and checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NormLayout = Literal["pre", "sandwich", "post"]

GATED_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
"""Activations of a gated FFN that the conversion is indifferent to."""

LAYER_NORMS: Mapping[NormLayout, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}
"""Norms of a decoder layer, in the order in which they run."""


@dataclass(frozen=True)
class Experts:
    """Where a mixture of experts keeps its router and experts; every expert is a gated FFN.

    Args:
        module: of the layer, in the checkpoint: `<module>.gate` chooses, `<module>.experts.<e>`
            are the experts.
        projections: names of an expert's gate, up and down projection.
        counts: config fields that may hold the number of experts.
        default_count: that number when the config leaves all of them out.
        default_top_k: experts per token when the config leaves `num_experts_per_tok` out.
        size: config field with the neurons of one expert.
        normalize: chosen experts' probabilities are divided by their sum: always, or where
            `norm_topk_prob` says so.
        shared: one more FFN is always computed, weighted by a gate of its own:
            `<module>.shared_expert` and `<module>.shared_expert_gate`.
    """

    module: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    counts: tuple[str, ...] = ("num_experts", "num_local_experts")
    default_count: int = 8
    default_top_k: int = 8
    size: str = "moe_intermediate_size"
    normalize: Literal["always", "config"] = "config"
    shared: bool = False


@dataclass(frozen=True)
class Family:
    """A family of decoders with a gated FFN, dense or a mixture of experts.

    Args:
        name: the family's name in recipes, commands and artifacts.
        model_types: values of `model_type` in config.json.
        module: stock classes live in transformers.models.<module>.modeling_<module>.
        prefix: they are called <prefix>Attention, <prefix>RMSNorm, <prefix>RotaryEmbedding ...
        norm_layout: norms before each half of a layer, before and after, or after.
        attention: attention linears, grouped by the input they share.
        attention_bias: linears with a bias: none, all if the config says so, or always q, k, v.
        qk_norm: none, over one head, or over the full width of q and of k.
        fused_gate_up: one tensor `mlp.gate_up_proj` holds the rows [gate; up].
        activation_field: config field that names the activation.
        activation: its value when the config leaves it out.
        defaults: other config fields that the stock class fills in when they are left out.
        accepted: config fields that limit what is handled, with the values that are.
        mixed_attention: `layer_types` may give layers different attention types.
        scaled_embedding: embeddings are multiplied by sqrt(D), <prefix>TextScaledWordEmbedding.
        rotary_per_layer_type: the rotary embedding depends on the layer's attention type.
        sdpa: the stock class supports scaled_dot_product_attention.
        experts: of a mixture of experts; None in a dense model.
    """

    name: str
    model_types: tuple[str, ...]
    module: str
    prefix: str
    norm_layout: NormLayout = "pre"
    attention: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
    attention_bias: Literal["none", "config", "qkv"] = "none"
    qk_norm: Literal["none", "head", "full"] = "none"
    fused_gate_up: bool = False
    activation_field: str = "hidden_act"
    activation: str = "silu"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    mixed_attention: bool = False
    scaled_embedding: bool = False
    rotary_per_layer_type: bool = False
    sdpa: bool = True
    experts: Experts | None = None

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of a layer's norms, in the order in which they run."""
        return LAYER_NORMS[self.norm_layout]

    @property
    def attention_linears(self) -> tuple[str, ...]:
        """Names of all attention linears."""
        return tuple(name for group in self.attention for name in group)


@dataclass(frozen=True)
class Dims:
    """Sizes of a decoder, in elements; `ffn` counts the neurons of all experts of a layer."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def q_width(self) -> int:
        """Width of the queries, which is the input width of o_proj."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim
