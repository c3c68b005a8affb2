"""Choices a report is read against: random and oracle routing over the same experts.

Shapes: T tokens, D model width, E routed experts, K chosen per token, M neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.modules_fissile import FissileExperts, RoutedMLP
from fissile.models.routers_fissile import Route, choose


def oracle_norms(experts: FissileExperts, x_TD: Tensor) -> Tensor:
    """Norm of every expert's true output, (T, E); an upper bound on what a router can know."""
    norms = []
    for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
        gate, up = nn.functional.linear(x_TD, gate_up).chunk(2, dim=-1)
        y_TD = nn.functional.linear(experts.act_fn(gate) * up, down)
        norms.append(y_TD.norm(dim=-1))
    return torch.stack(norms, dim=-1)


def oracle_choice(mlp: RoutedMLP, threshold: float | None = None) -> Callable[[Tensor], Route]:
    """Route to the experts with the largest output norm.

    Args:
        mlp: whose experts are meant.
        threshold: of the norms; where given, a token takes the experts above it (at most as many as
            the model's slots) instead of `top_k`. See `balance.calibrate_threshold`.
    """

    @torch.no_grad()
    def route(x_TD: Tensor) -> Route:
        assert isinstance(mlp.experts, FissileExperts)
        slots = mlp.top_k if threshold is None else mlp.slots
        return choose(oracle_norms(mlp.experts, x_TD), slots, False, threshold=threshold)

    return route


def random_choice(mlp: RoutedMLP, seed: int) -> Callable[[Tensor], Route]:
    """Route to experts drawn without regard to the token.

    Every call starts the same stream, so repeated passes over a batch see the same choices.
    """

    def route(x_TD: Tensor) -> Route:
        assert isinstance(mlp.experts, FissileExperts)
        generator = torch.Generator().manual_seed(seed)
        noise_TE = torch.rand(x_TD.shape[0], mlp.experts.num_experts, generator=generator)
        index_TK = noise_TE.topk(mlp.top_k, dim=-1).indices
        return index_TK, torch.ones_like(index_TK, dtype=x_TD.dtype)

    return route


def fixed_choice(expert: int) -> Callable[[Tensor], Route]:
    """Route every token to one expert, as Read-ME's perplexity test does per domain."""

    def route(x_TD: Tensor) -> Route:
        index_TK = torch.full((x_TD.shape[0], 1), expert, device=x_TD.device)
        return index_TK, torch.ones_like(index_TK, dtype=x_TD.dtype)

    return route


def install_control(
    layer: FissileDecoderLayer, kind: str, seed: int, threshold: float | None = None
) -> None:
    """Make a layer route by a control instead of its router.

    Args:
        layer: a layer with disjoint experts.
        kind: "random" or "oracle".
        seed: of the random choice; give every layer its own.
        threshold: see `oracle_choice`.

    Raises:
        ValueError: another kind.
    """
    mlp = layer.mlp
    if kind == "oracle":
        mlp.override = oracle_choice(mlp, threshold)
    elif kind == "random":
        mlp.override = random_choice(mlp, seed)
    else:
        raise ValueError(f"control {kind!r} is neither 'random' nor 'oracle'")
