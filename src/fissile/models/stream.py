"""Run a model one layer at a time: at most one layer's weights are in memory.

Shapes: N windows, B windows of one batch, S tokens per window, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fissile.models.build import empty_layer, prepare_parts, rotary_of
from fissile.models.configuration_fissile import FissileConfig, stock_class
from fissile.models.modeling_fissile import (
    FissileDecoderLayer,
    build_context,
    build_embedding,
)
from fissile.models.routers_fissile import Route, Router, build_router, choose_layers


class StateSource(Protocol):
    """Where weights come from: a checkpoint on disk, or a dictionary in memory."""

    config: FissileConfig

    def layer_state(self, layer_idx: int) -> dict[str, Tensor]:
        """Tensors of one layer, named relative to it ("self_attn.q_proj.weight"), float32."""
        ...

    def outer_state(self) -> dict[str, Tensor]:
        """Everything outside the layers under its full name; lm_head is absent when tied."""
        ...


class StreamedModel:
    """Forward pass in pieces, on the CPU in float32.

    Args:
        source: the weights. Layers are read each time they are asked for.
    """

    def __init__(self, source: StateSource) -> None:
        self.source, self.config = source, source.config
        prepare_parts(self.config)
        outer = source.outer_state()
        embedding = outer["model.embed_tokens.weight"]
        self.embedding = build_embedding(self.config)
        self.embedding.weight = nn.Parameter(embedding, requires_grad=False)
        self.head = outer.get("lm_head.weight", embedding)
        norm = stock_class(self.config, "RMSNorm")
        self.norm = norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
        self.norm.weight = nn.Parameter(outer["model.norm.weight"], requires_grad=False)
        self.rotary = rotary_of(self.config)
        self.router: Router | None = None
        prefix = "model.router."
        state = {k.removeprefix(prefix): v for k, v in outer.items() if k.startswith(prefix)}
        if state and (router := build_router(self.config)) is not None:
            self.router = router.eval()
            self.router.load_state_dict(state, assign=True)

    @property
    def num_layers(self) -> int:
        """Decoder layers, not counting a router's cache layer."""
        return self.config.num_base_layers

    def layer(self, layer_idx: int) -> FissileDecoderLayer:
        """Build layer `layer_idx` with its weights, in evaluation mode."""
        layer = empty_layer(self.config, layer_idx)
        layer.load_state_dict(self.source.layer_state(layer_idx), assign=True)
        return layer.requires_grad_(False)

    @torch.no_grad()
    def embed(self, ids_NS: Tensor) -> Tensor:
        """Token ids to the residual stream entering layer 0, (N, S, D)."""
        return self.embedding(ids_NS)

    @torch.no_grad()
    def context(self, hidden_BSD: Tensor) -> dict[str, dict[str, Any]]:
        """Masks and rotary embeddings for windows without padding."""
        return build_context(self.config, self.rotary, hidden_BSD)

    @torch.no_grad()
    def routes(self, ids_BS: Tensor) -> list[Route | None]:
        """The pre-gating router's decisions per layer, or None per layer without such a router."""
        if self.router is None:
            return [None] * self.num_layers
        embeds_BSD = self.embed(ids_BS)
        context = self.context(embeds_BSD).get("full_attention", {})
        logits_HTE = self.router(embeds_BSD, ids_BS, **context)
        return [*choose_layers(self.config, logits_HTE, self.router.balance, False)]

    @torch.no_grad()
    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits (B, S, V) of windows without padding, one layer in memory at a time."""
        hidden_BSD = self.embed(ids_BS)
        for i, route in enumerate(self.routes(ids_BS)):
            hidden_BSD = self.layer(i)(hidden_BSD, route, self.context(hidden_BSD))
        return self.logits(hidden_BSD)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Final norm, head and soft cap; (B, S, V)."""
        logits = nn.functional.linear(self.norm(hidden_BSD), self.head)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap


def batches(ids_NS: Tensor, batch_tokens: int) -> Iterator[slice]:
    """Slices over windows (N, S, ...), at most `batch_tokens` tokens each."""
    count, tokens = ids_NS.shape[:2]
    size = max(1, batch_tokens // max(1, tokens))
    for begin in range(0, count, size):
        yield slice(begin, min(count, begin + size))
