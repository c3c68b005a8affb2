"""Engines that load our folders, and their rules as data, checked from config.json and headers.

The versions are those whose rules were read or tried; newer ones usually load more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fissile.export.classes import FFNS, stock_shapes
from fissile.export.gguf_names import gguf_problems
from fissile.export.hosts import SILU
from fissile.io.headers import CheckpointHeaders

AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that servers load as one: they need one format, width and group size."""


@dataclass(frozen=True)
class Engine:
    """An engine and what it loads.

    Args:
        name: word on the command line.
        version: whose rules these are.
        classes: model types that it has of its own.
        remote: runs the modeling files of a folder.
        fused_silu: computes fused experts with silu whatever the configuration says.
        derived_heads: model types whose head size it takes as width / heads.
        formats: quantization methods to the widths that it has kernels for; with whether they may
            be asymmetric.
        untied: model types whose head it never gives the embeddings' weight.
    """

    name: str
    version: str
    classes: tuple[str, ...]
    remote: bool = False
    fused_silu: bool = False
    derived_heads: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    formats: Mapping[str, tuple[tuple[int, ...], bool]] | None = None


TRANSFORMERS = Engine("transformers", "5.23", tuple(FFNS), remote=True)
VLLM = Engine(
    "vllm",
    "0.32",
    tuple(FFNS),
    remote=True,
    fused_silu=True,
    derived_heads=("qwen2", "qwen2_moe"),
    untied=("glm4_moe",),
    formats={"compressed-tensors": ((4, 8), True), "gptq": ((4, 8), False)},
)
LLAMA_CPP = Engine(
    "llama.cpp",
    "of 2026",
    ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe"),
)
ENGINES: Mapping[str, Engine] = {e.name: e for e in (TRANSFORMERS, VLLM, LLAMA_CPP)}


@dataclass(frozen=True)
class Rule:
    """One rule of an engine, and whether a folder keeps it."""

    name: str
    ok: bool
    detail: str


def engine_rules(engine: Engine, headers: CheckpointHeaders) -> Iterator[Rule]:
    """Check a folder against an engine's rules without starting it.

    Args:
        engine: which one.
        headers: config.json and tensor headers of the folder, artifact or stock.
    """
    config = headers.config
    kind = config.get("model_type")
    if kind == "fissile":
        yield from _artifact_rules(engine, config)
        return
    known = kind in engine.classes
    yield Rule("class", known, f"{kind!r}; it has {', '.join(engine.classes)}")
    if not known:
        return
    quantization = config.get("quantization_config")
    if quantization is not None:
        yield from _format_rules(engine, quantization, headers)
    else:
        yield _tensors_rule(headers)
    yield from _class_rules(engine, config)


def _artifact_rules(engine: Engine, config: Mapping[str, Any]) -> Iterator[Rule]:
    yield Rule("remote code", engine.remote, "the artifact brings its own modeling files")
    if not engine.remote:
        return
    missing = [name for name in AUTO_CLASSES if name not in config.get("auto_map", {})]
    detail = f"{missing[0]} is missing" if missing else ", ".join(AUTO_CLASSES)
    yield Rule("auto_map", not missing, detail)
    if engine is not VLLM:
        return
    routing, activation = config.get("routing"), config["backbone"]["activation"]
    if _fused_experts(config):
        ok = activation in SILU
        detail = f"experts use {activation}; fused ones are computed with silu"
        yield Rule("activation", ok, detail if ok else f"{detail}; quantize them for the plug-in")
    if routing is not None and routing["kind"] == "pregate":
        yield from _router_rules(config)


def _fused_experts(config: Mapping[str, Any]) -> bool:
    """Whether some experts are what the engine takes into its own hands: float and disjoint."""
    routing = config.get("routing")
    if routing is None or routing["kind"] == "static" or routing["layout"] == "membership":
        return False
    nested = (config.get("nested") or {}).get("modules", ())
    experts = {name for name in nested if name.endswith(".mlp.experts.down_proj")}
    return len(experts) < sum(size > 0 for size in routing["expert_sizes"])


def _router_rules(config: Mapping[str, Any]) -> Iterator[Rule]:
    """The router's keys and values lie in a cache that has the backbone's geometry."""
    router = config["routing"]["router"]
    block = router.get("block", "attention")
    if block == "token":
        return
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    own_keys = router.get("query_heads", 4) if block == "readme" else keys
    own = router.get("query_heads", own_keys)
    ok = own_keys == keys and heads % own == 0
    detail = f"{own} query and {own_keys} key heads; the backbone has {heads} and {keys}"
    yield Rule("router's heads", ok, detail)


def _tensors_rule(headers: CheckpointHeaders) -> Rule:
    expected = stock_shapes(headers.config)
    found = {name: info.shape for name, (_, info) in headers.tensors.items()}
    wrong = [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        if name in found
        else f"{name} is missing"
        for name, shape in expected.items()
        if found.get(name) != shape
    ]
    wrong += [f"{name} has no place" for name in found if name not in expected]
    return Rule("tensors", not wrong, wrong[0] if wrong else f"{len(found)}, names and shapes")


def _class_rules(engine: Engine, config: Mapping[str, Any]) -> Iterator[Rule]:
    activation, kind = config.get("hidden_act", "silu"), config["model_type"]
    moe = kind.endswith("_moe") or kind == "mixtral"
    if engine.fused_silu and moe:
        yield Rule("activation", activation in SILU, f"{activation}; fused experts use silu")
    if kind in engine.derived_heads:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads
        detail = f"{size} for width {hidden} and {heads} heads"
        yield Rule("head size", size * heads == hidden, detail)
    if kind in engine.untied:
        tied = bool(config.get("tie_word_embeddings", False))
        yield Rule("head", not tied, "tied to the embeddings" if tied else "a weight of its own")
    if engine is LLAMA_CPP:
        reasons = list(gguf_problems(config))
        yield Rule("architecture", not reasons, reasons[0] if reasons else kind)


def _format_rules(
    engine: Engine, quantization: Mapping[str, Any], headers: CheckpointHeaders
) -> Iterator[Rule]:
    method = str(quantization.get("quant_method"))
    if engine.formats is None:
        yield Rule("format", True, f"{method}: read by a package of its own")
        return
    known = method in engine.formats
    yield Rule("format", known, f"{method}; accepted: {', '.join(engine.formats)}")
    if not known:
        return
    bits, symmetric = _bits_of(quantization)
    widths, asymmetric = engine.formats[method]
    detail = f"{bits} bits; {method} has kernels for {', '.join(map(str, widths))}"
    yield Rule("width", bits in widths, detail)
    yield Rule("zero points", symmetric or asymmetric, "symmetric" if symmetric else "integer")
    suffix = ".weight_packed" if method == "compressed-tensors" else ".qweight"
    packed = {n.removesuffix(suffix) for n in headers.tensors if n.endswith(suffix)}
    mixed = []
    for name in sorted(packed):
        stem, _, leaf = name.rpartition(".")
        group = next((g for g in FUSED if leaf in g), ())
        mixed += [f"{stem}.{other}" for other in group if f"{stem}.{other}" not in packed]
    detail = f"{mixed[0]} is not quantized, its neighbours are" if mixed else "one format each"
    yield Rule("fused linears", not mixed, detail)


def _bits_of(quantization: Mapping[str, Any]) -> tuple[int, bool]:
    """Width, and whether the format is symmetric; widths that differ between groups are width 0."""
    if "bits" in quantization:
        return int(quantization["bits"]), bool(quantization.get("sym", True))
    groups = [g["weights"] for g in quantization.get("config_groups", {}).values()]
    widths = {g["num_bits"] for g in groups}
    return (widths.pop() if len(widths) == 1 else 0), all(g["symmetric"] for g in groups)
