"""Layers on nested weights as vLLM runs them: shared among processes, opaque to its compiler.

A layer computes what its class in `fissile.models` computes, on this process's share of the
weights, behind one operator that a compiler does not look into: which code multiplies depends on
the number of tokens, and experts on their values. Layers that share out their inputs add up the
results of all processes.

Shapes: T tokens, K slots per token, D model width; "..." any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fissile.models.modules_fissile import FissilePool, GatedMLP, NestedExperts
from fissile.models.nested_fissile import NestedLinear, NestedTensor
from fissile.models.stacks_fissile import NestedStack
from fissile.serve.vllm_plugin.shards import Cut, Ranks, Shard

Reduce = Callable[[Tensor], Tensor]
ROWWISE = ("o_proj", "down_proj")
"""Linears whose inputs are what the linears before them put out."""
COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def running_layer(name: str) -> Any:
    """The layer of that name in the model that vLLM is running."""
    from vllm.forward_context import get_forward_context

    return get_forward_context().no_compile_layers[name]


@torch.library.custom_op(
    "fissile::served", mutates_args=(), schema="(Tensor x, str name, SymInt outputs) -> Tensor"
)
def served(x: Tensor, name: str, outputs: int) -> Tensor:
    """What a layer makes of (..., K): (..., outputs)."""
    return running_layer(name).compute(x)


@served.register_fake
def _(x: Tensor, name: str, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@torch.library.custom_op(
    "fissile::served_experts",
    mutates_args=(),
    schema="(Tensor x, Tensor index, Tensor weights, str name) -> Tensor",
)
def served_experts(x: Tensor, index: Tensor, weights: Tensor, name: str) -> Tensor:
    """What a layer's experts make of (T, D): (T, D)."""
    return running_layer(name).compute(x, index, weights)


@served_experts.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


class ServedLinear(NestedLinear):
    """A linear layer behind the operator."""

    registration: Registration

    def forward(self, x: Tensor) -> Tensor:
        y = served(x, self.registration.name, self.out_features)
        return self.registration.reduce(y) if self.registration.adds_up else y

    def compute(self, x: Tensor) -> Tensor:
        """This process's share."""
        return super().forward(x)


class ServedMLP(GatedMLP):
    """A gated MLP behind the operator; its down projection's bias is the first process's."""

    registration: Registration

    def forward(self, x: Tensor) -> Tensor:
        return self.registration.reduce(served(x, self.registration.name, x.shape[-1]))

    def compute(self, x: Tensor) -> Tensor:
        """This process's share."""
        return super().forward(x)


class ServedExperts(NestedExperts):
    """Experts behind the operator."""

    registration: Registration

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        y = served_experts(hidden_states, top_k_index, top_k_weights, self.registration.name)
        return self.registration.reduce(y)

    def compute(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """This process's share."""
        return super().forward(x, index, weights)


class ServedPool(FissilePool):
    """Overlapping experts behind the operator; never shared out."""

    registration: Registration

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:  # type: ignore[override]
        return served_experts(x_TD, index_TK, weights_TK, self.registration.name)

    def compute(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The chosen experts' sum."""
        return super().forward(x, index, weights)


@dataclass(frozen=True)
class Registration:
    """Where a layer stands.

    Attributes:
        name: by which the operator finds it.
        adds_up: the processes' results are summands.
        reduce: sum over all processes.
    """

    name: str
    adds_up: bool
    reduce: Reduce


@dataclass(frozen=True)
class LayerGroup:
    """What all layers of a model share.

    Attributes:
        ranks: this process's place.
        reduce: sum over all processes; identity for one.
        layers: names to layers, where the operator looks.
    """

    ranks: Ranks
    reduce: Reduce
    layers: dict[str, Any]

    def register(self, layer: nn.Module, kind: type[nn.Module], name: str, adds_up: bool) -> None:
        """Make `layer` a served one."""
        layer.__class__ = kind
        layer.registration = Registration(name, adds_up, self.reduce)  # type: ignore[assignment]
        self.layers[name] = layer


def serve_layers(model: nn.Module, prefix: str, group: LayerGroup) -> Iterator[Shard]:
    """Turn the layers of a model that hold nested weights into served ones, in place.

    Args:
        model: of `fissile.models`, its nested weights still empty.
        prefix: of its names in the checkpoint, "model.".
        group: what they share.

    Yields:
        Every nested weight, to be read.

    Raises:
        ValueError: a layer cannot be shared out.
    """
    registered: set[str] = set()
    for path, module in list(model.named_modules()):
        name = prefix + path
        if isinstance(module, NestedExperts):
            yield from _experts(module, name, group)
        elif isinstance(module, GatedMLP):
            linears = [f"{name}.{leaf}" for leaf, _ in module.named_children()]
            if isinstance(module, FissilePool):
                if group.ranks.size > 1:
                    raise ValueError(f"{name}: overlapping experts cannot be shared out")
                group.register(module, ServedPool, name, adds_up=False)
            elif _all_nested(module):
                group.register(module, ServedMLP, name, adds_up=True)
            else:
                continue
            registered.update(linears)
            for leaf, linear in module.named_children():
                if isinstance(linear, NestedLinear):
                    yield _linear(linear, f"{name}.{leaf}", group.ranks)
        elif isinstance(module, NestedLinear) and name not in registered:
            yield _linear(module, name, group.ranks)
            adds_up = name.rpartition(".")[2] in ROWWISE
            group.register(module, ServedLinear, name, adds_up)


def _all_nested(mlp: GatedMLP) -> bool:
    return all(isinstance(x, NestedLinear) for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


def _experts(experts: NestedExperts, name: str, group: LayerGroup) -> Iterator[Shard]:
    cuts: dict[str, Cut] = {"gate_up_proj": "halves", "down_proj": "inputs"}
    for leaf, cut in cuts.items():
        weight, full = getattr(experts, leaf), f"{name}.{leaf}"
        if isinstance(weight, NestedStack):
            yield from weight.replace(partial(Shard, name=full, cut=cut, ranks=group.ranks))
            continue
        shard = Shard(weight, full, cut, group.ranks)
        setattr(experts, leaf, shard)
        yield shard
    group.register(experts, ServedExperts, name, adds_up=True)


def _linear(linear: NestedLinear, name: str, ranks: Ranks) -> Shard:
    leaf = name.rpartition(".")[2]
    cut: Cut = "inputs" if leaf in ROWWISE else "rows" if leaf in COLWISE else "whole"
    if cut == "whole" and ranks.size > 1:
        raise ValueError(f"{name}: it is not known how processes could share it")
    shard = Shard(linear.weight, f"{name}.weight", cut, ranks)
    linear.weight = cast(NestedTensor, shard)
    linear.out_features, linear.in_features = shard.shape
    if linear.bias is not None and cut == "inputs" and ranks.rank:
        linear.register_parameter("bias", None)
    elif linear.bias is not None and cut == "rows" and ranks.size > 1:
        linear.bias = nn.Parameter(torch.zeros(shard.shape[0]), requires_grad=False)
        linear.bias.weight_loader = _own_rows(ranks)  # type: ignore[attr-defined]
    return shard


def _own_rows(ranks: Ranks) -> Callable[[Tensor, Tensor], None]:
    def load(parameter: Tensor, loaded: Tensor) -> None:
        parameter.data.copy_(loaded.narrow(0, *ranks.span(len(loaded), "bias")))

    return load
