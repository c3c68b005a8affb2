"""The chosen experts of a training step, all tokens of an expert in one product.

The loop over experts in models/ reads well and serves any width, but its backward pass makes a
gradient of the whole stack for every expert. Here tokens are sorted by expert once and gradients
are written in place, in the dtype that autocast asks for.

Shapes: T tokens, K slots, E experts, P = T*K pairs, D model width, M neurons per expert; I inputs
and O outputs of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fissile.models.modules_fissile import FissileExperts
from fissile.models.precision import exact_routers, replaced_forwards


class _Product(torch.autograd.Function):
    """x_PI times the weight of each row's expert; rows are sorted by expert."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight_EOI: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_PI, weight_EOI)
        ctx.counts = counts
        out_PO = x_PI.new_zeros(len(x_PI), weight_EOI.shape[1])
        for rows, expert in _ranges(counts):
            torch.mm(x_PI[rows], weight_EOI[expert].T, out=out_PO[rows])
        return out_PO

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, weight_EOI = ctx.saved_tensors
        grad_PO = outer[0].contiguous()
        grad_PI = torch.zeros_like(x_PI) if ctx.needs_input_grad[0] else None
        grad_EOI = torch.zeros_like(weight_EOI) if ctx.needs_input_grad[1] else None
        for rows, expert in _ranges(ctx.counts):
            if grad_PI is not None:
                torch.mm(grad_PO[rows], weight_EOI[expert], out=grad_PI[rows])
            if grad_EOI is not None:
                torch.mm(grad_PO[rows].T, x_PI[rows], out=grad_EOI[expert])
        return grad_PI, grad_EOI, None


class _Gather(torch.autograd.Function):
    """Rows of every pair, sorted; its gradient is a sum over slots instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, place_P: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(place_P)
        ctx.slots = slots
        return x_TD.index_select(0, order_P // slots)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (place_P,) = ctx.saved_tensors
        grad_PD = outer[0].index_select(0, place_P)
        return grad_PD.unflatten(0, (-1, ctx.slots)).sum(1), None, None, None


class _Restore(torch.autograd.Function):
    """Rows of sorted pairs in their first order."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, order_P: Tensor, place_P: Tensor) -> Tensor:
        ctx.save_for_backward(order_P)
        return y_PD.index_select(0, place_P)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (order_P,) = ctx.saved_tensors
        return outer[0].index_select(0, order_P), None, None


def _ranges(counts: list[int]) -> Iterator[tuple[slice, int]]:
    begin = 0
    for expert, count in enumerate(counts):
        if count:
            yield slice(begin, begin + count), expert
        begin += count


def grouped_experts(
    experts: FissileExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sum of the chosen experts' outputs, (T, D), as `FissileExperts` computes it.

    Args:
        experts: the stacked weights.
        hidden_states: inputs of the MLP, (T, D).
        top_k_index: chosen experts, int64 (T, K).
        top_k_weights: weight of each output, (T, K); where it is zero nothing is computed.
    """
    x_TD = hidden_states
    # Read once: with adapters attached, every access to a parameter recomputes it.
    gate_up: Tensor = experts.gate_up_proj
    down: Tensor = experts.down_proj
    kind = x_TD.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x_TD, gate_up, down = x_TD.to(dtype), gate_up.to(dtype), down.to(dtype)
    count, slots = len(gate_up), top_k_index.shape[1]
    # Pairs of weight zero are sorted behind all others, where no product reaches them.
    expert_P = top_k_index.masked_fill(top_k_weights == 0, count).flatten()
    order_P = expert_P.argsort(stable=True)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    counts = expert_P.bincount(minlength=count)[:count].tolist()
    x_PD = _Gather.apply(x_TD, order_P, place_P, slots)
    h_P2M = _Product.apply(x_PD, gate_up, counts)
    gate_PM, up_PM = h_P2M.chunk(2, dim=-1)
    y_PD = _Product.apply(experts.act_fn(gate_PM) * up_PM, down, counts)
    y_PD = _Restore.apply(y_PD, order_P, place_P)
    y_TKD = y_PD.unflatten(0, (-1, slots)) * top_k_weights[..., None].to(y_PD.dtype)
    return y_TKD.sum(1)


@contextmanager
def ready_to_train(model: nn.Module) -> Iterator[None]:
    """Experts by `grouped_experts`, routers in their own precision, until the block ends."""
    grouped: dict[nn.Module, Callable[..., Any]] = {
        module: partial(grouped_experts, module)
        for module in model.modules()
        if isinstance(module, FissileExperts)
    }
    with exact_routers(model), replaced_forwards(grouped):
        yield
