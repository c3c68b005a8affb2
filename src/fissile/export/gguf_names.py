"""GGUF's words for what we export: architectures, metadata and tensor names, as data.

Source: the constants of the `gguf` package and llama.cpp's loaders of these architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fissile.export.hosts import HOSTS, SILU, windowed

DENSE: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""Model types of plain classes to architectures."""

ROPES = ("default", "linear", "llama3")
"""Rotary embeddings that are written."""

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
_EXPERT_PART = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: its GGUF name, and which of a stack of experts it is."""

    name: str
    expert: int | None = None


def place_of(name: str) -> Place:
    """GGUF's name of a tensor of a stock checkpoint.

    Raises:
        KeyError: no architecture that we write has such a tensor.
    """
    if name in _OUTER:
        return Place(_OUTER[name])
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    if found := _EXPERT.fullmatch(rest):
        return Place(f"blk.{index}.{_EXPERT_PART[found[2]]}.weight", int(found[1]))
    if rest in _LAYER:
        return Place(f"blk.{index}.{_LAYER[rest]}")
    stem, _, leaf = rest.rpartition(".")
    return Place(f"blk.{index}.{_LAYER[stem]}.{leaf}")


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Architecture that a stock configuration becomes, None if there is none that we write."""
    hosts = {host.model_type: host.gguf for host in HOSTS.values()}
    return DENSE.get(config["model_type"]) or hosts.get(config["model_type"])


def gguf_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Why llama.cpp would not run a stock configuration, or not as transformers does."""
    if architecture_of(config) is None:
        yield (
            f"gguf: no architecture is written for {config['model_type']}; accepted: "
            f"{', '.join([*DENSE, *(h.model_type for h in HOSTS.values() if h.gguf)])}"
        )
        return
    if config.get("hidden_act", "silu") not in SILU:
        yield f"gguf: llama.cpp computes these classes with silu, not {config['hidden_act']}"
    if windowed(config):
        yield (
            f"gguf: layers have a sliding window of {config['sliding_window']} tokens, which "
            f"llama.cpp's {architecture_of(config)} ignores"
        )
    rope = rope_type(config)
    if rope not in ROPES:
        yield f"gguf: rotary embeddings of type {rope} are not written, {', '.join(ROPES)} are"
    if config["model_type"] == "qwen2_moe" and not config.get("qkv_bias", True):
        yield "gguf: llama.cpp's qwen2moe needs biases on q, k and v; use --via mixtral"
    if config["model_type"] == "qwen2_moe" and config["num_experts_per_tok"] > 1:
        yield (
            "gguf: llama.cpp's qwen2moe does not normalise the weights of several experts; use "
            "--via mixtral"
        )


def rope_type(config: Mapping[str, Any]) -> str:
    """Kind of rotary embedding."""
    rope = config.get("rope_parameters") or {}
    return str(rope.get("rope_type", "default"))


def metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Key-value pairs below the architecture's name.

    Args:
        config: of a stock class.

    Returns:
        Key without the architecture's prefix to an int, float or bool.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    rope = config.get("rope_parameters") or {}
    experts = config.get("num_local_experts", config.get("num_experts", 0))
    found: dict[str, Any] = {
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": hidden,
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": size,
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
    }
    if rope_type(config) == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if experts:
        found |= {
            "expert_count": experts,
            "expert_used_count": config["num_experts_per_tok"],
        }
        if config["model_type"] != "mixtral":
            found["expert_feed_forward_length"] = config["moe_intermediate_size"]
    if "shared_expert_intermediate_size" in config:
        found["expert_shared_feed_forward_length"] = config["shared_expert_intermediate_size"]
    return found


def rope_heads(name: str, config: Mapping[str, Any]) -> int | None:
    """Heads whose rows are interleaved in llama.cpp's `llama` architecture, None for other rows."""
    if architecture_of(config) != "llama":
        return None
    if ".self_attn.q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".self_attn.k_proj." in name else None
