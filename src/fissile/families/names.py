"""Names and shapes of the tensors of a stock checkpoint, and the canonical names they go by.

Canonical names are those of a Fissile model: attention and norms keep their stock names, the dense
FFN is `mlp.shared` (all neurons always computed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fissile.families.base import Dims, Family
from fissile.families.experts import StockExperts, stock_experts
from fissile.families.table import dims_of, setting


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor lies in the checkpoint.

    Args:
        name: the stored tensor; the first of several.
        stored: its shape, and that of each of several.
        rows: the rows [begin, end) of it that are meant; None means all.
        experts: stored tensors of every expert, whose rows follow each other; the canonical tensor
            stacks the experts. Empty where it is not a stack.
    """

    name: str
    stored: tuple[int, ...]
    rows: tuple[int, int] | None = None
    experts: tuple[tuple[str, ...], ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All stored tensors."""
        return tuple(name for parts in self.experts for name in parts) or (self.name,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical tensor."""
        if self.experts:
            return (len(self.experts), len(self.experts[0]) * self.stored[0], *self.stored[1:])
        if self.rows is None:
            return self.stored
        return (self.rows[1] - self.rows[0], *self.stored[1:])


def attention_shapes(family: Family, dims: Dims) -> dict[str, tuple[int, int]]:
    """Shape (out, in) of every attention linear of a layer."""
    shapes = {
        "q_proj": (dims.q_width, dims.hidden),
        "k_proj": (dims.kv_width, dims.hidden),
        "v_proj": (dims.kv_width, dims.hidden),
        "qkv_proj": (dims.q_width + 2 * dims.kv_width, dims.hidden),
        "o_proj": (dims.hidden, dims.q_width),
    }
    return {name: shapes[name] for name in family.attention_linears}


def attention_and_norms(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors outside the FFN, by name within the layer.

    These names are the same in dense checkpoints and in artifacts.
    """
    dims = dims_of(family, config)
    found: dict[str, tuple[int, ...]] = {}
    all_biased = family.attention_bias == "config" and setting(family, config, "attention_bias")
    for name, shape in attention_shapes(family, dims).items():
        found[f"self_attn.{name}.weight"] = shape
        if all_biased or (family.attention_bias == "qkv" and name != "o_proj"):
            found[f"self_attn.{name}.bias"] = shape[:1]
    if family.qk_norm != "none":
        full = family.qk_norm == "full"
        found["self_attn.q_norm.weight"] = (dims.q_width if full else dims.head_dim,)
        found["self_attn.k_norm.weight"] = (dims.kv_width if full else dims.head_dim,)
    for norm in family.norms:
        found[f"{norm}.weight"] = (dims.hidden,)
    return found


def layer_names(family: Family, config: Mapping[str, Any], layer: int) -> dict[str, Source]:
    """Canonical name to source of every tensor of one layer of a stock checkpoint."""
    dims, prefix = dims_of(family, config), f"model.layers.{layer}"
    names = attention_and_norms(family, config).items()
    found = {f"{prefix}.{name}": Source(f"{prefix}.{name}", shape) for name, shape in names}
    if (experts := stock_experts(family, config)) is not None:
        return found | _expert_names(family, experts, prefix, dims.hidden)
    width, ffn = dims.hidden, dims.ffn
    if family.fused_gate_up:
        fused, stored = f"{prefix}.mlp.gate_up_proj.weight", (2 * ffn, width)
        gate = Source(fused, stored, rows=(0, ffn))
        up = Source(fused, stored, rows=(ffn, 2 * ffn))
    else:
        gate = Source(f"{prefix}.mlp.gate_proj.weight", (ffn, width))
        up = Source(f"{prefix}.mlp.up_proj.weight", (ffn, width))
    found[f"{prefix}.mlp.shared.gate_proj.weight"] = gate
    found[f"{prefix}.mlp.shared.up_proj.weight"] = up
    down = Source(f"{prefix}.mlp.down_proj.weight", (width, ffn))
    found[f"{prefix}.mlp.shared.down_proj.weight"] = down
    return found


def _expert_names(
    family: Family, experts: StockExperts, prefix: str, width: int
) -> dict[str, Source]:
    """Router and experts of a layer; with a gated shared expert where the family has one."""
    layout = family.experts
    assert layout is not None
    module, (gate, up, down) = f"{prefix}.{layout.module}", layout.projections

    def stacked(shape: tuple[int, int], *projections: str) -> Source:
        names = tuple(
            tuple(f"{module}.experts.{e}.{name}.weight" for name in projections)
            for e in range(experts.count)
        )
        return Source(names[0][0], shape, experts=names)

    selector = Source(f"{module}.gate.weight", (experts.count, width))
    found = {
        f"{prefix}.mlp.selector.weight": selector,
        f"{prefix}.mlp.experts.gate_up_proj": stacked((experts.size, width), gate, up),
        f"{prefix}.mlp.experts.down_proj": stacked((width, experts.size), down),
    }
    if experts.shared:
        shared = f"{module}.shared_expert"
        shapes = {"gate_proj": (experts.shared, width), "up_proj": (experts.shared, width)}
        shapes["down_proj"] = (width, experts.shared)
        for name, shape in shapes.items():
            source = Source(f"{shared}.{name}.weight", shape)
            found[f"{prefix}.mlp.shared.{name}.weight"] = source
        found[f"{prefix}.mlp.shared_gate.weight"] = Source(f"{shared}_gate.weight", (1, width))
    return found


def outer_names(family: Family, config: Mapping[str, Any]) -> dict[str, Source]:
    """Canonical name to source of the tensors outside the layers; no lm_head when it is tied."""
    dims = dims_of(family, config)
    shapes = {
        "model.embed_tokens.weight": (dims.vocab, dims.hidden),
        "model.norm.weight": (dims.hidden,),
    }
    if not dims.tied:
        shapes["lm_head.weight"] = (dims.vocab, dims.hidden)
    return {name: Source(name, shape) for name, shape in shapes.items()}


def dense_names(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Source]]:
    """Every canonical name of a stock model with its source, embeddings first, layer by layer."""
    outer = outer_names(family, config)
    yield "model.embed_tokens.weight", outer.pop("model.embed_tokens.weight")
    for layer in range(dims_of(family, config).layers):
        yield from layer_names(family, config, layer).items()
    yield from outer.items()
