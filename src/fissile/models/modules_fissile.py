"""Parts of a Fissile model: bit-nested weights, shared and routed experts.

This file is copied into every artifact and must work there without the fissile package. Rules
that serving engines impose are marked "engine:".

Shapes: B batch, S sequence, T = B*S tokens, D model width, F FFN width, M neurons per expert,
E routed experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from fissile.models.configuration_fissile import FissileConfig, slots_of
from fissile.models.nested_fissile import (
    NestedLinear,
    NestedTensor,
    few_products,
    held_by_kernels,
    kernels_for,
)
from fissile.models.routers_fissile import Route, Selector, choose
from fissile.models.stacks_fissile import NestedStack, routes_of, stack_of, tensors_of


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
        self.activation = config.backbone["activation"]
        self.act_fn = ACT2FN[self.activation]
        nest_linears(config, self, prefix)

    def neurons(self, x: Tensor) -> Tensor:
        """Activations h = act(gate(x)) * up(x), (..., size)."""
        return self.act_fn(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: Tensor) -> Tensor:
        linears: tuple[nn.Module, ...] = (self.gate_proj, self.up_proj, self.down_proj)
        nested: list[NestedTensor] = [
            linear.weight for linear in linears if isinstance(linear, NestedLinear)
        ]
        alike = len(nested) == 3 and nested[0].alike(nested[1])
        kernels = kernels_for(nested, x, self.activation) if alike else None
        if kernels is None:
            return self.down_proj(self.neurons(x))
        gate_up = held_by_kernels(kernels, nested[:2], paired=True)
        down = held_by_kernels(kernels, nested[2:])
        y = kernels.mlp(x, gate_up, down, self.activation)
        return y if self.down_proj.bias is None else y + self.down_proj.bias


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
        self.gate_up_proj = stack_of(config, f"{prefix}.gate_up_proj", (experts, 2 * size, width))
        self.down_proj = stack_of(config, f"{prefix}.down_proj", (experts, width, size))
        both = [self.gate_up_proj, self.down_proj]
        plans = {weight.bits_E for weight in both if isinstance(weight, NestedStack)}
        if len(plans) > 1 or (plans and any(isinstance(w, NestedTensor) for w in both)):
            raise ValueError(f"nested.mixed of {prefix}: an expert's two weights differ in width")
        self.activation = config.backbone["activation"]
        self.act_fn = ACT2FN[self.activation]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        nested = [*tensors_of(self.gate_up_proj), *tensors_of(self.down_proj)]
        kernels = kernels_for(nested, hidden_states, self.activation, top_k_weights)
        if kernels is not None:
            return self._compiled(kernels, hidden_states, top_k_index, top_k_weights)
        downs = tensors_of(self.down_proj)
        if few_products(downs, self.num_experts, hidden_states, top_k_index):
            return self._few(hidden_states, top_k_index, top_k_weights)
        return sum_experts(self._one, hidden_states, top_k_index, top_k_weights)

    def _compiled(self, kernels: Any, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Every width's experts by the compiled kernels, summed."""
        pairs = zip(tensors_of(self.gate_up_proj), tensors_of(self.down_proj), strict=True)
        routes = routes_of(self.down_proj, index_TK, weights_TK)
        total: Tensor | None = None
        for (gate_up, down), route in zip(pairs, routes, strict=True):
            wide = held_by_kernels(kernels, [gate_up], paired=True)
            narrow = held_by_kernels(kernels, [down])
            y_TD: Tensor = kernels.experts(x_TD, route, wide, narrow, self.activation)
            total = y_TD if total is None else total + y_TD
        assert total is not None
        return total

    def _one(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self.gate_up_proj.product(x, expert).chunk(2, dim=-1)
        return self.down_proj.product(self.act_fn(gate) * up, expert)

    def _few(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """All tokens and all of their experts in two products on packed codes."""
        token_R, slot_R = torch.where(weights_TK != 0)
        expert_R = index_TK[token_R, slot_R]
        gate, up = self.gate_up_proj.products(x_TD[token_R], expert_R).chunk(2, dim=-1)
        y_RD = self.down_proj.products(self.act_fn(gate) * up, expert_R)
        y_RD = y_RD * weights_TK[token_R, slot_R, None].to(y_RD.dtype)
        return torch.zeros_like(x_TD).index_add_(0, token_R, y_RD)


def run_experts(
    weights: Callable[[int], tuple[Tensor, Tensor]],
    act_fn: Callable[[Tensor], Tensor],
    x_TD: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
) -> Tensor:
    """Sum of the chosen experts' outputs, (T, D); see `sum_experts`.

    Args:
        weights: expert to its (2M, D) gate and up rows and its (D, M) down projection.
        act_fn: activation of the gate.
        x_TD: inputs of the MLP.
        index_TK: chosen experts, int64.
        weights_TK: weight of each chosen expert's output.
    """

    def one(x: Tensor, expert: int) -> Tensor:
        gate_up, down = weights(expert)
        gate, up = nn.functional.linear(x, gate_up).chunk(2, dim=-1)
        return nn.functional.linear(act_fn(gate) * up, down)

    return sum_experts(one, x_TD, index_TK, weights_TK)


def sum_experts(
    mlp: Callable[[Tensor, int], Tensor], x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Sum of the chosen experts' outputs, (T, D); tokens are gathered expert by expert.

    Args:
        mlp: output of one expert for its tokens.
        x_TD: inputs of the MLP.
        index_TK: chosen experts, int64.
        weights_TK: weight of each chosen expert's output; where it is zero nothing is computed.
    """
    out_TD = torch.zeros_like(x_TD)
    taken_TK = weights_TK != 0
    for expert in torch.unique(index_TK[taken_TK]).tolist():
        token, slot = torch.where((index_TK == expert) & taken_TK)
        y = mlp(x_TD[token], expert)
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

    def kept(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Activations of the chosen experts' neurons, zero elsewhere, (T, P)."""
        h_TP = self.neurons(x_TD)
        keep_TP = torch.zeros_like(h_TP)
        taken_TK = weights_TK != 0
        for expert in torch.unique(index_TK[taken_TK]).tolist():
            token, slot = torch.where((index_TK == expert) & taken_TK)
            rows = self.rows(expert).to(x_TD.device)
            # A neuron that several chosen experts share is still computed once.
            block = weights_TK[token, slot, None].to(h_TP.dtype).expand(-1, len(rows))
            keep_TP[token[:, None], rows[None, :]] = block
        return h_TP * keep_TP

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:  # type: ignore[override]
        return self.down_proj(self.kept(x_TD, index_TK, weights_TK))


def restored(restore_ED: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """What the layer's bias holds in place of the experts that were chosen, (T, D).

    The bias carries sum_e restore[e], the mean output of experts that are not computed; those that
    are computed take their share back.
    """
    chosen_TE = weights_TK.new_zeros(len(index_TK), len(restore_ED))
    chosen_TE = chosen_TE.scatter_add(1, index_TK, weights_TK)
    return chosen_TE.to(restore_ED.dtype) @ restore_ED


class RoutedMLP(nn.Module):
    """Shared neurons, always computed, plus the chosen routed experts.

    Attributes:
        shared_gate: weighs the shared neurons' output by the sigmoid of one product; None without.
        restore: (E, D) subtracted for every chosen expert; see `restored`. None without it.
        override: replaces the router when set: a function from the MLP's input (T, D) to a route.
            Controls (random, oracle) are expressed with it.
    """

    def __init__(self, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        routing, prefix = config.routing, f"model.layers.{layer_idx}.mlp"
        shared = config.intermediate_size
        self.selector: Selector | None = None
        self.experts: nn.Module | None = None
        self.pool: FissilePool | None = None
        self.override: Callable[[Tensor], Route] | None = None
        self.restore: nn.Parameter | None = None
        if routing is not None:
            shared = routing["shared_sizes"][layer_idx]
            self.num_experts = routing["num_experts"]
            self.top_k, self.slots = routing["top_k"], slots_of(routing)
            thresholds = routing.get("threshold")
            self.threshold = thresholds[layer_idx] if thresholds else None
            if routing["kind"] == "layerwise":
                self.selector = Selector(config)
            if routing["kind"] != "static":
                self._build_experts(config, layer_idx, prefix)
            if routing.get("restore") and routing["kind"] != "static":
                self.restore = nn.Parameter(torch.zeros(routing["num_experts"], config.hidden_size))
        bias = bool(routing and routing.get("shared_bias"))
        self.shared = GatedMLP(config, shared, f"{prefix}.shared", bias) if shared else None
        gated = bool(routing and routing.get("shared_gate"))
        self.shared_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

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

    @property
    def routes(self) -> bool:
        """Whether anything is chosen here: there are routed neurons."""
        return self.experts is not None or self.pool is not None

    def decide(self, x_TD: Tensor, route: Route | None) -> Route | None:
        """The route that this layer follows, given the pre-gating router's."""
        if self.override is not None:
            return self.override(x_TD)
        if self.selector is not None:
            return choose(
                self.selector(x_TD),
                self.slots,
                self.training and torch.is_grad_enabled(),
                balance_E=self.selector.balance,
                threshold=self.threshold,
                probabilities=self.selector.probabilities,
            )
        return route

    def forward(self, hidden_states: Tensor, route: Route | None = None) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        out_TD = None if self.shared is None else self.shared(x_TD)
        if out_TD is not None and self.shared_gate is not None:
            out_TD = out_TD * torch.sigmoid(self.shared_gate(x_TD))
        routed = self.experts if self.experts is not None else self.pool
        if routed is not None:
            route = self.decide(x_TD, route)
            assert route is not None
            y_TD = routed(x_TD, *route)
            out_TD = y_TD if out_TD is None else out_TD + y_TD
            if self.restore is not None:
                out_TD = out_TD - restored(self.restore, *route).to(out_TD.dtype)
        if out_TD is None:
            out_TD = torch.zeros_like(x_TD)
        return out_TD.view_as(hidden_states)
