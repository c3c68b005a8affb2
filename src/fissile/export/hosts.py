"""Stock mixture-of-experts classes that a converted model can be expressed in, as data.

What a class can hold decides what can be lowered into it; `problems` says what cannot, why, and
what to do instead. Nothing here reads weights or imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fissile.families.base import Family
from fissile.families.table import dims_of, setting

SILU = ("silu", "swish")
"""Names of the one activation that serving engines fuse into experts."""


@dataclass(frozen=True)
class Host:
    """A stock class with routed experts.

    Args:
        name: word for it on the command line.
        model_type: in config.json.
        architecture: class in transformers.
        families: backbones whose attention and norms it repeats exactly.
        block: name of the MoE block inside a layer.
        linears: names of an expert's gate, up and down projections.
        scoring: how it turns router logits into weights.
        shared: no shared expert; one behind a sigmoid gate; or one that is always added.
        shared_name: name of the shared expert within the block.
        correction: its choice has an additive bias that its weights do not.
        qk_norm: never, always, or as the configuration says.
        bias: attention biases it may have.
        head_size: head size may differ from width / heads in every engine that serves it.
        expert_size_field: config field of an expert's width.
        experts_field: config field of their number.
        ties: every engine that serves it gives the head the embeddings' weight where they are tied.
        gguf: architecture in GGUF files; None if llama.cpp cannot read what we write.
    """

    name: str
    model_type: str
    architecture: str
    families: tuple[str, ...]
    block: str = "mlp"
    linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    shared: Literal["none", "gated", "plain"] = "none"
    shared_name: str = ""
    correction: bool = False
    qk_norm: Literal["none", "always", "config"] = "none"
    bias: Literal["none", "qkv", "all"] = "none"
    head_size: bool = True
    expert_size_field: str = "moe_intermediate_size"
    experts_field: str = "num_experts"
    ties: bool = True
    gguf: str | None = None


MIXTRAL = Host(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    families=("llama", "mistral"),
    block="block_sparse_moe",
    linears=("w1", "w3", "w2"),
    expert_size_field="intermediate_size",
    experts_field="num_local_experts",
    gguf="llama",
)
QWEN2_MOE = Host(
    name="qwen2-moe",
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    families=("llama", "mistral", "qwen2"),
    shared="gated",
    shared_name="shared_expert",
    bias="qkv",
    head_size=False,
    gguf="qwen2moe",
)
QWEN3_MOE = Host(
    name="qwen3-moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    families=("qwen3",),
    qk_norm="always",
    bias="all",
    gguf="qwen3moe",
)
GLM4_MOE = Host(
    name="glm4-moe",
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    families=("llama", "mistral", "qwen2", "qwen3"),
    scoring="sigmoid",
    shared="plain",
    shared_name="shared_experts",
    correction=True,
    qk_norm="config",
    bias="qkv",
    experts_field="n_routed_experts",
    ties=False,  # vLLM's class has a head of its own and no word for a missing weight
)
HOSTS: Mapping[str, Host] = {host.name: host for host in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE)}


@dataclass(frozen=True)
class Known:
    """What the weights say that config.json does not; the defaults assume the convenient answer.

    Args:
        constants: a bias of an FFN, or a constant of an expert, is not zero.
        selector_bias: a layer-wise router's bias (or balance) differs between experts.
    """

    constants: bool = False
    selector_bias: bool = False


def problems(host: Host, family: Family, config: Mapping[str, Any], known: Known) -> Iterator[str]:
    """Why a converted model cannot be expressed in a class; nothing if it can, exactly.

    Args:
        host: the class.
        family: of the backbone.
        config: of the artifact, or of the one that a run will write.
        known: what is known of the weights.
    """
    routing = config.get("routing")
    if routing is None or routing["kind"] == "static":
        yield f"{host.name}: the model routes nothing; export it with --to dense"
        return
    yield from _backbone_problems(host, family, config)
    kind = routing["kind"]
    if routing.get("threshold"):
        yield (
            f"{host.name}: experts are taken above a threshold, stock classes take a fixed number; "
            "convert with route.dynamic_k=false"
        )
    if known.constants:
        yield (
            f"{host.name}: FFNs have biases or constants per expert, which stock classes lack; "
            "convert with recover.constants=false"
        )
    if routing["layout"] == "membership" and routing["top_k"] > 1:
        yield (
            f"{host.name}: overlapping experts add up only one at a time; convert with "
            "extract.top_k=1 or extract.method=fissile"
        )
    if kind == "pregate":
        yield from _pregate_problems(host, family, config)
    else:
        yield from _layerwise_problems(host, routing, known)


def _backbone_problems(host: Host, family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    if family.name not in host.families:
        others = [h.name for h in HOSTS.values() if family.name in h.families]
        way = f"accepted for {family.name}: {', '.join(others)}" if others else _NATIVE
        yield f"{host.name}: its attention and norms are not those of {family.name}; {way}"
        return
    activation = setting(family, config, family.activation_field)
    if activation not in SILU:
        yield (
            f"{host.name}: experts with {activation} would run with silu in engines that fuse them;"
            f" {_NATIVE}"
        )
    if family.attention_bias == "config" and setting(family, config, "attention_bias"):
        if host.bias != "all":
            yield f"{host.name}: has no bias on o_proj, attention_bias is true; {_NATIVE}"
    elif family.attention_bias == "qkv" and host.bias == "none":
        yield f"{host.name}: has no bias on q, k and v; use qwen2-moe or glm4-moe"
    if windowed(config):
        yield (
            f"{host.name}: layers have a sliding window of {config.get('sliding_window')} tokens, "
            f"shorter than the {config.get('max_position_embeddings')} positions; {_NATIVE}"
        )


_NATIVE = "serve the artifact itself (trust_remote_code, or the plug-in)"


def windowed(config: Mapping[str, Any]) -> bool:
    """Whether some layer sees fewer tokens than the model has positions."""
    window, most = config.get("sliding_window"), config.get("max_position_embeddings")
    types = config.get("layer_types")
    if window is None or (types is not None and "sliding_attention" not in types):
        return False
    if config.get("use_sliding_window") is False:
        return False
    return most is None or int(window) < int(most)


def _pregate_problems(host: Host, family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    routing = config["routing"]
    block = routing["router"].get("block", "attention")
    if host.correction:
        hosts = [h.name for h in HOSTS.values() if family.name in h.families and not h.correction]
        yield (
            f"{host.name}: holds layer-wise routers, this model decides before layer 0; "
            f"use {' or '.join(hosts)}"
        )
        return
    if routing["top_k"] != 1:
        yield (
            f"{host.name}: a router before layer 0 is lowered with top_k 1, this model has "
            f"{routing['top_k']}: stock classes weigh several experts unequally; convert with "
            f"extract.top_k=1, or {_NATIVE}"
        )
    if block == "readme":
        yield (
            f"{host.name}: Read-ME's router has an embedding table and biases of its own; convert "
            "with route.block=attention"
        )
    if block == "attention" and host.qk_norm == "always":
        yield (
            f"{host.name}: normalises queries and keys in every layer, the router does not; convert"
            " with route.block=token"
        )


def _layerwise_problems(host: Host, routing: Mapping[str, Any], known: Known) -> Iterator[str]:
    selector = routing.get("selector", "linear")
    if selector != "linear":
        yield (
            f"{host.name}: its router is linear, this model's is {selector}; convert with "
            "route.selector=ridge"
        )
    elif known.selector_bias and not host.correction:
        yield (
            f"{host.name}: its router has no bias, this model's has one; use glm4-moe, whose "
            "correction bias holds it, or convert with route.selector=mean_gate and "
            "recover.train_router=false"
        )


def host_width(family: Family, config: Mapping[str, Any], host: Host, spare: int) -> int:
    """Width of the residual stream of a host that needs `spare` more dimensions.

    A multiple of 32, so that blocks of integer codes stay whole; where the head size follows from
    width and heads, a multiple of the keys' width, with query heads to match.
    """
    dims = dims_of(family, config)
    if host.head_size:
        return dims.hidden if not spare else -(-(dims.hidden + spare) // 32) * 32
    step = dims.kv_heads * dims.head_dim
    return max(-(-(dims.hidden + spare) // step), dims.heads // dims.kv_heads) * step


_QWEN: Mapping[str, Any] = {
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "use_sliding_window": False,
    "sliding_window": None,
}


def class_fields(host: Host, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a host's configuration that are its own; sizes are the caller's."""
    biased = family.attention_bias == "qkv" or bool(setting(family, config, "attention_bias"))
    if host is MIXTRAL:
        return {"sliding_window": None, "router_jitter_noise": 0.0}
    if host is QWEN2_MOE:
        return {**_QWEN, "qkv_bias": biased}
    if host is QWEN3_MOE:
        return {**_QWEN, "attention_bias": biased}
    return {
        "attention_bias": biased,
        "use_qk_norm": family.qk_norm == "head",
        "partial_rotary_factor": 1.0,
        "rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": 1.0},
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 0,
    }
