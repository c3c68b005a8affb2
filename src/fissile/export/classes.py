"""Names and shapes that stock classes expect in a checkpoint, written from their definitions.

Engines look tensors up by these names; a folder whose tensors are not exactly these loads with
random weights, or not at all. Nothing here knows how a lowering works: it is what one is checked
against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _mixtral(config: Mapping[str, Any], block: str) -> Shapes:
    hidden, size = config["hidden_size"], config["intermediate_size"]
    yield f"{block}.block_sparse_moe.gate.weight", (config["num_local_experts"], hidden)
    for e in range(config["num_local_experts"]):
        expert = f"{block}.block_sparse_moe.experts.{e}"
        yield f"{expert}.w1.weight", (size, hidden)
        yield f"{expert}.w2.weight", (hidden, size)
        yield f"{expert}.w3.weight", (size, hidden)


def _gated(name: str, hidden: int, size: int) -> Shapes:
    yield f"{name}.gate_proj.weight", (size, hidden)
    yield f"{name}.up_proj.weight", (size, hidden)
    yield f"{name}.down_proj.weight", (hidden, size)


def _routed(config: Mapping[str, Any], block: str, experts: int) -> Shapes:
    hidden, size = config["hidden_size"], config["moe_intermediate_size"]
    yield f"{block}.mlp.gate.weight", (experts, hidden)
    for e in range(experts):
        yield from _gated(f"{block}.mlp.experts.{e}", hidden, size)


def _qwen3_moe(config: Mapping[str, Any], block: str) -> Shapes:
    yield from _routed(config, block, config["num_experts"])


def _qwen2_moe(config: Mapping[str, Any], block: str) -> Shapes:
    hidden = config["hidden_size"]
    yield from _routed(config, block, config["num_experts"])
    size = config["shared_expert_intermediate_size"]
    yield from _gated(f"{block}.mlp.shared_expert", hidden, size)
    yield f"{block}.mlp.shared_expert_gate.weight", (1, hidden)


def _glm4_moe(config: Mapping[str, Any], block: str) -> Shapes:
    experts = config["n_routed_experts"]
    yield from _routed(config, block, experts)
    yield f"{block}.mlp.gate.e_score_correction_bias", (experts,)
    size = config["moe_intermediate_size"] * config["n_shared_experts"]
    yield from _gated(f"{block}.mlp.shared_experts", config["hidden_size"], size)


def _dense(config: Mapping[str, Any], block: str) -> Shapes:
    hidden, size = config["hidden_size"], config["intermediate_size"]
    yield from _gated(f"{block}.mlp", hidden, size)
    if config.get("mlp_bias"):
        for name, rows in (("gate", size), ("up", size), ("down", hidden)):
            yield f"{block}.mlp.{name}_proj.bias", (rows,)


FFNS: Mapping[str, Callable[[Mapping[str, Any], str], Shapes]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "llama": _dense,
    "mistral": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
}
"""FFN of a layer by model type."""

QKV_BIAS = {"qwen2_moe": "qkv_bias", "qwen2": None, "glm4_moe": "attention_bias"}
"""Types whose q, k and v may have biases o has not, and the field that says so (None: always)."""

ALL_BIAS = ("llama", "qwen3", "qwen3_moe")
"""Types in which `attention_bias` gives all four projections a bias."""

HEAD_NORMS = ("qwen3", "qwen3_moe")
"""Types with norms over each head of q and k."""


def stock_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of a stock class, for the types in `FFNS`.

    Args:
        config: contents of its config.json.

    Raises:
        KeyError: another model type, or a missing field.
    """
    kind, hidden, vocab = config["model_type"], config["hidden_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        found |= dict(_attention(config, block)) | dict(FFNS[kind](config, block))
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{block}.{norm}.weight"] = (hidden,)
    return found


def _attention(config: Mapping[str, Any], block: str) -> Shapes:
    kind, hidden = config["model_type"], config["hidden_size"]
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    rows = {"q": heads * size, "k": keys * size, "v": keys * size, "o": hidden}
    field = QKV_BIAS.get(kind, "")
    qkv = kind in QKV_BIAS and (field is None or bool(config.get(field, field == "qkv_bias")))
    every = kind in ALL_BIAS and bool(config.get("attention_bias"))
    for name, count in rows.items():
        inputs = heads * size if name == "o" else hidden
        yield f"{block}.self_attn.{name}_proj.weight", (count, inputs)
        if every or (qkv and name != "o"):
            yield f"{block}.self_attn.{name}_proj.bias", (count,)
    if kind in HEAD_NORMS or config.get("use_qk_norm"):
        yield f"{block}.self_attn.q_norm.weight", (size,)
        yield f"{block}.self_attn.k_norm.weight", (size,)
