"""Parts of a Fissile model: bit-nested weights, shared and routed experts, the pre-gating router.

This file is copied into every artifact and must work there without the fissile package. Rules
that serving engines impose are marked "engine:".

Shapes: B batch, S sequence, T = B*S tokens, D model width, F FFN width, M neurons per expert,
E routed experts, K chosen per token, L layers, R width of the router's attention output.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fissile.kernels.layout import dequantize, part_shape, segment_names
from fissile.models.configuration_fissile import FissileConfig

Route = tuple[Tensor, Tensor]
"""Chosen experts of every token, int64 (T, K), and their weights (T, K)."""


def stock_module(config: FissileConfig) -> ModuleType:
    """Import the transformers module that holds the backbone's classes.

    Raises:
        ValueError: the name in the config is no plain module name.
    """
    name = str(config.backbone["module"])
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"config.backbone.module {name!r} is not a module of transformers.models")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def stock_class(config: FissileConfig, suffix: str) -> Any:
    """Return the backbone's class, e.g. "Attention" -> LlamaAttention."""
    return getattr(stock_module(config), config.backbone["prefix"] + suffix)


class NestedTensor(nn.Module):
    """One weight as bit planes: codes and the floats of the served width, held as buffers.

    engine: serving engines re-allocate parameters in the model's dtype, so packed data are buffers.
    """

    def __init__(self, config: FissileConfig, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        nested, bits = config.nested, config.check_bits()
        assert nested is not None
        assert bits is not None
        group = nested.get("groups", {}).get(name, nested["group_size"])
        self.bits, self.shape = bits, shape
        self.segments = segment_names(bits, nested["widths"])
        for segment in self.segments:
            dtype = torch.int16 if segment.startswith("theta") else torch.uint8
            size = part_shape(segment, shape, group)
            self.register_buffer(segment, torch.zeros(size, dtype=dtype))

    def dense(self, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Decode to (..., N, K) in `dtype`; `index` picks one matrix of a stack."""
        parts = {name: getattr(self, name) for name in self.segments}
        if index is not None:
            parts = {name: part[index] for name, part in parts.items()}
        return dequantize(parts, self.bits).to(dtype)


class NestedLinear(nn.Module):
    """A linear layer on a nested weight."""

    def __init__(self, config: FissileConfig, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = NestedTensor(config, name, (linear.out_features, linear.in_features))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.dense(x.dtype), self.bias)


def nest_linears(config: FissileConfig, module: nn.Module, prefix: str) -> None:
    """Replace the direct linear children of `module` that the config lists as nested."""
    listed = set((config.nested or {}).get("modules", ()))
    for child, linear in list(module.named_children()):
        name = f"{prefix}.{child}.weight"
        if name in listed and isinstance(linear, nn.Linear):
            setattr(module, child, NestedLinear(config, name, linear))


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) over `size` neurons."""

    def __init__(self, config: FissileConfig, size: int, prefix: str, bias: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.gate_proj = nn.Linear(width, size, bias=False)
        self.up_proj = nn.Linear(width, size, bias=False)
        self.down_proj = nn.Linear(size, width, bias=bias)
        self.act_fn = ACT2FN[config.backbone["activation"]]
        nest_linears(config, self, prefix)

    def neurons(self, x: Tensor) -> Tensor:
        """Activations h = act(gate(x)) * up(x), (..., size)."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.neurons(x))


@use_experts_implementation
class FissileExperts(nn.Module):
    """E disjoint experts of M neurons as stacked weights.

    engine: the child is called `experts`, its only members are the two 3-D parameters, and its
    forward takes (hidden, top_k_index, top_k_weights): fused kernels can then replace it.
    """

    def __init__(self, config: FissileConfig, size: int) -> None:
        super().__init__()
        assert config.routing is not None
        self.num_experts, self.intermediate_dim = config.routing["num_experts"], size
        self.hidden_dim = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * size, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, size))
        self.act_fn = ACT2FN[config.backbone["activation"]]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # Read once: with adapters attached, every access to a parameter recomputes it.
        gate_up, down = self.gate_up_proj, self.down_proj
        return run_experts(
            lambda e: (gate_up[e], down[e]), self.act_fn, hidden_states, top_k_index, top_k_weights
        )


class NestedExperts(nn.Module):
    """The same experts on nested weights; at most one expert is decoded at a time."""

    def __init__(self, config: FissileConfig, size: int, prefix: str) -> None:
        super().__init__()
        assert config.routing is not None
        experts, width = config.routing["num_experts"], config.hidden_size
        self.num_experts = experts
        self.gate_up_proj = NestedTensor(
            config, f"{prefix}.gate_up_proj", (experts, 2 * size, width)
        )
        self.down_proj = NestedTensor(config, f"{prefix}.down_proj", (experts, width, size))
        self.act_fn = ACT2FN[config.backbone["activation"]]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        def weights(expert: int) -> tuple[Tensor, Tensor]:
            dtype = hidden_states.dtype
            return self.gate_up_proj.dense(dtype, expert), self.down_proj.dense(dtype, expert)

        return run_experts(weights, self.act_fn, hidden_states, top_k_index, top_k_weights)


def run_experts(
    weights: Callable[[int], tuple[Tensor, Tensor]],
    act_fn: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Sum of the chosen experts' outputs, (T, D); tokens are gathered expert by expert.

    Args:
        weights: expert to its (2M, D) gate and up rows and its (D, M) down projection.
        act_fn: activation of the gate.
        x_TD: inputs of the MLP.
        index_TK: chosen experts, int64.
        weights_TK: weight of each chosen expert's output.
    """
    out_TD = torch.zeros_like(x_TD)
    for expert in torch.unique(index_TK).tolist():
        token, slot = torch.where(index_TK == expert)
        gate_up, down = weights(expert)
        gate, up = nn.functional.linear(x_TD[token], gate_up).chunk(2, dim=-1)
        y = nn.functional.linear(act_fn(gate) * up, down)
        out_TD = out_TD.index_add(0, token, y * weights_TK[token, slot, None].to(y.dtype))
    return out_TD


class FissilePool(GatedMLP):
    """Overlapping experts (Read-ME, section 3.1): lists of neuron blocks of one weight set."""

    def __init__(
        self, config: FissileConfig, blocks: list[tuple[int, list[int]]], prefix: str
    ) -> None:
        super().__init__(config, sum(size for size, _ in blocks), prefix, bias=False)
        self.blocks = blocks

    def rows(self, expert: int) -> Tensor:
        """Indices of the neurons that belong to `expert`, int64."""
        ranges, begin = [torch.empty(0, dtype=torch.int64)], 0
        for size, members in self.blocks:
            if expert in members:
                ranges.append(torch.arange(begin, begin + size))
            begin += size
        return torch.cat(ranges)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:  # type: ignore[override]
        h_TP = self.neurons(x_TD)
        keep_TP = torch.zeros_like(h_TP)
        for expert in torch.unique(index_TK).tolist():
            token, slot = torch.where(index_TK == expert)
            rows = self.rows(expert).to(x_TD.device)
            # A neuron that several chosen experts share is still computed once.
            block = weights_TK[token, slot, None].to(h_TP.dtype).expand(-1, len(rows))
            keep_TP[token[:, None], rows[None, :]] = block
        return self.down_proj(h_TP * keep_TP)


def choose(logits_TE: Tensor, top_k: int, straight_through: bool) -> Route:
    """The `top_k` experts of every token, with weight one each.

    In training the weight is 1 + p - stop(p), so the language-model loss reaches the router.
    """
    index_TK = torch.topk(logits_TE, top_k, dim=-1).indices
    if not straight_through:
        return index_TK, torch.ones_like(index_TK, dtype=logits_TE.dtype)
    p_TK = torch.softmax(logits_TE.float(), dim=-1).gather(-1, index_TK)
    return index_TK, (1.0 + p_TK - p_TK.detach()).to(logits_TE.dtype)


class RoutedMLP(nn.Module):
    """Shared neurons, always computed, plus the chosen routed experts.

    Attributes:
        override: replaces the router when set: a function from the MLP's input (T, D) to a route.
            Controls (random, oracle) are expressed with it.
    """

    def __init__(self, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        routing, prefix = config.routing, f"model.layers.{layer_idx}.mlp"
        shared = config.intermediate_size
        self.selector: nn.Linear | None = None
        self.experts: nn.Module | None = None
        self.pool: FissilePool | None = None
        self.override: Callable[[Tensor], Route] | None = None
        if routing is not None:
            shared = routing["shared_sizes"][layer_idx]
            self.top_k = routing["top_k"]
            if routing["kind"] == "layerwise":
                self.selector = nn.Linear(config.hidden_size, routing["num_experts"])
            if routing["kind"] != "static":
                self._build_experts(config, layer_idx, prefix)
        bias = bool(routing and routing.get("shared_bias"))
        self.shared = GatedMLP(config, shared, f"{prefix}.shared", bias) if shared else None

    def _build_experts(self, config: FissileConfig, layer_idx: int, prefix: str) -> None:
        assert config.routing is not None
        if config.routing["layout"] == "membership":
            self.pool = FissilePool(config, config.routing["blocks"][layer_idx], f"{prefix}.pool")
            return
        size = config.routing["expert_sizes"][layer_idx]
        nested = f"{prefix}.experts.down_proj" in (config.nested or {}).get("modules", ())
        self.experts = (
            NestedExperts(config, size, f"{prefix}.experts")
            if nested
            else FissileExperts(config, size)
        )

    def decide(self, x_TD: Tensor, route: Route | None) -> Route | None:
        """The route that this layer follows, given the pre-gating router's."""
        if self.override is not None:
            return self.override(x_TD)
        if self.selector is not None:
            return choose(
                self.selector(x_TD), self.top_k, self.training and torch.is_grad_enabled()
            )
        return route

    def forward(self, hidden_states: Tensor, route: Route | None = None) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TD = self.shared(x_TD) if self.shared is not None else torch.zeros_like(x_TD)
        routed = self.experts if self.experts is not None else self.pool
        if routed is not None:
            route = self.decide(x_TD, route)
            assert route is not None
            out_TD = out_TD + routed(x_TD, *route)
        return out_TD.view_as(hidden_states)


class RouterAttention(nn.Module):
    """Causal attention with the backbone's heads; keys and values live in cache layer L."""

    def __init__(self, config: FissileConfig, layer_idx: int, out_features: int) -> None:
        super().__init__()
        width, heads, kv = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = getattr(config, "head_dim", None) or width // heads
        self.num_key_value_groups, self.scaling = heads // kv, self.head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, out_features, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        stock = stock_module(self.config)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = stock.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # engine: exactly one call of the interface, so that it can be found and replaced.
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, stock.eager_attention_forward
        )
        out, _ = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous())


class PreGateRouter(nn.Module):
    """One Llama-style block over the token embeddings; decides before layer 0 for all layers.

    logits = down(silu(gate n) * up n), n = [e, attention(w_in * e / rms(e))] * w_out / rms(e).
    Both halves are normalised by the embedding's rms alone: this is the shape that can be lowered
    into one more layer of a stock architecture.
    """

    def __init__(self, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.routing is not None
        dims, width = config.routing["router"], config.hidden_size
        joint, inner = width + dims["attention_dim"], dims["inner_dim"]
        self.heads = config.num_base_layers if config.routing["per_layer"] else 1
        self.num_experts, self.eps = config.routing["num_experts"], config.rms_norm_eps
        self.norm_in = nn.Parameter(torch.ones(width))
        self.norm_out = nn.Parameter(torch.ones(joint))
        # engine: a path to an attention module holds exactly one integer, unique in the model.
        self.layers = nn.ModuleDict(
            {str(layer_idx): RouterAttention(config, layer_idx, dims["attention_dim"])}
        )
        self.gate_proj = nn.Linear(joint, inner, bias=False)
        self.up_proj = nn.Linear(joint, inner, bias=False)
        self.down_proj = nn.Linear(inner, self.heads * self.num_experts, bias=False)

    def forward(self, inputs_embeds: Tensor, **context: Any) -> Tensor:
        """Embeddings (B, S, D) to logits (heads, T, E); heads is 1 or the number of layers."""
        e = inputs_embeds.float()
        inverse_rms = torch.rsqrt(e.pow(2).mean(-1, keepdim=True) + self.eps)
        scaled = (e * inverse_rms * self.norm_in).to(inputs_embeds.dtype)
        attended = next(iter(self.layers.values()))(scaled, **context)
        joint = torch.cat([e, attended.float()], dim=-1) * inverse_rms * self.norm_out
        joint = joint.to(inputs_embeds.dtype)
        inner = nn.functional.silu(self.gate_proj(joint)) * self.up_proj(joint)
        return self.down_proj(inner).reshape(-1, self.heads, self.num_experts).transpose(0, 1)
