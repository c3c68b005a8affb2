"""Dense and statically pruned models as plain checkpoints of their own family.

Layers keep different numbers of neurons; a plain class has one width, so that narrower layers are
filled up with neurons that are zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fissile.export.hosts import windowed
from fissile.export.pieces import Lowered, Piece, Target
from fissile.families.artifact import float_shapes
from fissile.families.base import Family
from fissile.families.names import attention_and_norms
from fissile.families.table import ARTIFACT_TYPE, dims_of, setting

OURS = (
    "backbone",
    "num_base_layers",
    "routing",
    "nested",
    "bits",
    "auto_map",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "quantization_config",
)
"""Fields of an artifact's configuration that a plain class does not have."""

ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
"""Class of each family."""

BIASED = ("llama", "mistral", "qwen2")
"""Families whose attention Llama's class repeats: it alone has biases in the FFN."""


def dense_problems(family: Family, config: Mapping[str, Any], constants: bool) -> Iterator[str]:
    """Why a model has no plain dense form; nothing if it has one, exactly.

    Args:
        family: of the backbone.
        config: of the artifact or checkpoint.
        constants: some FFN has a bias that is not zero.
    """
    routing = config.get("routing")
    if routing is not None and routing["kind"] != "static":
        yield (
            "dense: the model chooses experts; use --to mixtral, qwen2-moe, qwen3-moe or glm4-moe, "
            "or convert with route.kind=static"
        )
        return
    if constants and (family.name not in BIASED or windowed(config) or not _silu(family, config)):
        yield (
            f"dense: FFNs have biases, and no plain class with the attention of {family.name} has "
            "any; convert with recover.constants=false"
        )


def _silu(family: Family, config: Mapping[str, Any]) -> bool:
    return setting(family, config, family.activation_field) in ("silu", "swish")


def lower_dense(family: Family, config: Mapping[str, Any], constants: bool) -> Lowered:
    """Describe a dense model, or what static pruning left of one, as its plain class.

    Args:
        family: of the backbone.
        config: of the artifact or checkpoint; `dense_problems` found nothing.
        constants: some FFN has a bias that is not zero.
    """
    dims, routing = dims_of(family, config), config.get("routing")
    sizes = routing["shared_sizes"] if routing else [dims.ffn] * dims.layers
    width = max(sizes)
    targets = [Target(n := "model.embed_tokens.weight", (dims.vocab, dims.hidden), (Piece(n),))]
    for i in range(dims.layers):
        layer = f"model.layers.{i}"
        for name, shape in attention_and_norms(family, config).items():
            targets.append(Target(f"{layer}.{name}", shape, (Piece(f"{layer}.{name}"),)))
            if constants and name == "self_attn.v_proj.bias":
                # Llama's class has a bias on o_proj wherever it has one on q, k and v.
                targets.append(Target(f"{layer}.self_attn.o_proj.bias", (dims.hidden,)))
        biased = constants and routing is not None and bool(routing.get("shared_bias"))
        targets += _ffn(family, layer, dims.hidden, width, sizes[i], biased)
    targets.append(Target(n := "model.norm.weight", (dims.hidden,), (Piece(n),)))
    if not dims.tied:
        targets.append(Target(n := "lm_head.weight", (dims.vocab, dims.hidden), (Piece(n),)))
    lowered = Lowered(_config(family, config, width, constants), tuple(targets), {}, {})
    stored = 0
    if config.get("model_type") == ARTIFACT_TYPE:
        for _, shape in float_shapes(family, config):
            count = 1
            for size in shape:
                count *= size
            stored += count
    cost = {
        "class": lowered.config["architectures"][0],
        "computed_neurons": width,
        "computed_neurons_before": round(sum(sizes) / len(sizes), 1),
        "parameters": lowered.parameters,
        "parameters_before": stored or lowered.parameters,
        "weights_exact": True,
    }
    return Lowered(lowered.config, lowered.targets, {}, cost)


def _ffn(
    family: Family, layer: str, hidden: int, width: int, size: int, biased: bool
) -> Iterator[Target]:
    source, target = f"{layer}.mlp.shared", f"{layer}.mlp"
    gate, up = Piece(f"{source}.gate_proj.weight"), Piece(f"{source}.up_proj.weight")
    if not size:
        gates: tuple[Piece, ...] = ()
        ups, downs = gates, gates
    else:
        gates, ups = (gate,), (up,)
        downs = (Piece(f"{source}.down_proj.weight"),)
    if family.fused_gate_up:
        both = (*gates, *(Piece(piece.source, at=(width, 0)) for piece in ups))
        yield Target(f"{target}.gate_up_proj.weight", (2 * width, hidden), both)
    else:
        yield Target(f"{target}.gate_proj.weight", (width, hidden), gates)
        yield Target(f"{target}.up_proj.weight", (width, hidden), ups)
    yield Target(f"{target}.down_proj.weight", (hidden, width), downs)
    if biased:
        yield Target(f"{target}.gate_proj.bias", (width,))
        yield Target(f"{target}.up_proj.bias", (width,))
        bias = Piece(f"{source}.down_proj.bias")
        yield Target(f"{target}.down_proj.bias", (hidden,), (bias,))


def _config(
    family: Family, config: Mapping[str, Any], width: int, constants: bool
) -> dict[str, Any]:
    dims = dims_of(family, config)
    fields = {k: v for k, v in config.items() if k not in OURS}
    types = fields.pop("layer_types", None)
    if types is not None and family.mixed_attention:
        fields["layer_types"] = list(types)[: dims.layers]
    name = "llama" if constants else family.name
    fields |= {
        "model_type": "llama" if constants else family.model_types[0],
        "architectures": [ARCHITECTURES[name]],
        "num_hidden_layers": dims.layers,
        "intermediate_size": width,
    }
    fields.setdefault("num_key_value_heads", dims.kv_heads)
    if family.name in ("llama", "mistral", "qwen2", "qwen3") and "rope_parameters" not in fields:
        fields["rope_parameters"] = _rope(fields)
    if constants:
        biased = family.attention_bias == "qkv" or bool(setting(family, config, "attention_bias"))
        fields |= {"mlp_bias": True, "attention_bias": biased, "head_dim": dims.head_dim}
        for field in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
            fields.pop(field, None)
    return fields


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding of a configuration from before transformers 5, whose fields are removed."""
    rope = dict(fields.pop("rope_scaling", None) or {})
    kind = rope.pop("type", "default")
    return {"rope_type": kind, **rope, "rope_theta": float(fields.pop("rope_theta", 10000.0))}
