"""What chooses the experts: selectors inside a layer, and routers that decide before layer 0.

This file is copied into every artifact and must work there without the fissile package. Rules that
serving engines impose are marked "engine:".

Shapes: B batch, S sequence, T = B*S tokens, D model width, E routed experts, K slots per token,
L layers, H heads of a router (1, or L with one decision per layer), R rank of a selector,
W width of Read-ME's router.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fissile.models.configuration_fissile import FissileConfig, slots_of, stock_module

Route = tuple[Tensor, Tensor]
"""Chosen experts of every token, int64 (T, K), and their weights (T, K)."""

ENGINES = ("vllm", "sglang")
"""Attention interfaces that give every attention of a model the backbone's number of heads."""


def choose(
    scores_TE: Tensor,
    slots: int,
    straight_through: bool,
    *,
    balance_E: Tensor | None = None,
    threshold: float | None = None,
    probabilities: Literal["softmax", "normalized"] | None = None,
) -> Route:
    """The experts of highest score of every token, with weight one each.

    In training the weight is 1 + p - stop(p), so the language-model loss reaches the router.
    Models that were trained as mixtures of experts weigh by probability instead.

    Args:
        scores_TE: what the router says (T, E).
        slots: most experts per token, K.
        straight_through: let gradients reach the scores.
        balance_E: added to the scores for the choice, never to a weight.
        threshold: experts whose score (with the balance) is below it get weight zero.
        probabilities: weights are the softmax over all experts, or that over its sum.
    """
    ranked_TE = scores_TE if balance_E is None else scores_TE + balance_E.to(scores_TE.dtype)
    top_TK, index_TK = torch.topk(ranked_TE, slots, dim=-1)
    weights_TK = torch.ones_like(top_TK)
    if probabilities is not None:
        p_TK = torch.softmax(scores_TE.float(), dim=-1).gather(-1, index_TK)
        if probabilities == "normalized":
            p_TK = p_TK / p_TK.sum(dim=-1, keepdim=True)
        weights_TK = p_TK.to(scores_TE.dtype)
    elif straight_through:
        p_TK = torch.softmax(scores_TE.float(), dim=-1).gather(-1, index_TK)
        weights_TK = (1.0 + p_TK - p_TK.detach()).to(scores_TE.dtype)
    if threshold is not None:
        weights_TK = weights_TK * (top_TK >= threshold)
    return index_TK, weights_TK


def choose_layers(
    config: FissileConfig, logits_HTE: Tensor, balance_HE: Tensor | None, straight_through: bool
) -> list[Route]:
    """A pre-gating router's logits to one route per layer."""
    routing, layers = config.routing, config.num_base_layers
    assert routing is not None
    thresholds = routing.get("threshold")
    routes: list[Route] = []
    for layer in range(layers if thresholds else len(logits_HTE)):
        head = layer if len(logits_HTE) > 1 else 0
        route = choose(
            logits_HTE[head],
            slots_of(routing),
            straight_through,
            balance_E=None if balance_HE is None else balance_HE[head],
            threshold=thresholds[layer] if thresholds else None,
        )
        routes.append(route)
    # The very same tensors for all layers: whoever sorts tokens by expert does so once.
    return routes if len(routes) > 1 else routes * layers


def selector_scores(
    kind: str,
    weights: Mapping[str, Tensor],
    x_TD: Tensor,
    num_experts: int,
    act_fn: Callable[[Tensor], Tensor],
) -> Tensor:
    """Scores (T, E) of a router inside a layer.

    Args:
        kind: "linear": W x + b. "softmax": W x, the logits of a model that was trained as a mixture
            of experts. "glu": mean over R representative neurons of |act(g x) (u x)|.
            "spectral": ||G_e x|| ||U_e x|| with factors of rank R, which stands for
            sqrt(x^T A_e x * x^T B_e x).
        weights: `weight` (E, D) and, if linear, `bias` (E,); or `gate` and `up` (E * R, D).
        x_TD: the MLP's input.
        num_experts: E.
        act_fn: activation of the FFN's gate.
    """
    if kind in ("linear", "softmax"):
        return nn.functional.linear(x_TD, weights["weight"], weights.get("bias"))
    gate_TER = nn.functional.linear(x_TD, weights["gate"]).unflatten(-1, (num_experts, -1))
    up_TER = nn.functional.linear(x_TD, weights["up"]).unflatten(-1, (num_experts, -1))
    if kind == "glu":
        return (act_fn(gate_TER) * up_TER).abs().mean(-1)
    return gate_TER.norm(dim=-1) * up_TER.norm(dim=-1)


class Selector(nn.Module):
    """A router inside a layer: from the MLP's input to one score per expert.

    Attributes:
        balance: (E,) added to the scores for the choice alone; None without it.
        probabilities: how chosen experts are weighted; see `choose`.
    """

    def __init__(self, config: FissileConfig) -> None:
        super().__init__()
        routing, width = config.routing, config.hidden_size
        assert routing is not None
        self.num_experts, self.kind = routing["num_experts"], routing.get("selector", "linear")
        self.probabilities: Literal["softmax", "normalized"] | None = None
        if self.kind == "softmax":
            self.probabilities = "normalized" if routing.get("normalize") else "softmax"
        self.act_fn = ACT2FN[config.backbone["activation"]]
        rows = self.num_experts * routing.get("selector_rank", 1)
        if self.kind == "linear":
            shapes: dict[str, tuple[int, ...]]
            shapes = {"weight": (self.num_experts, width), "bias": (self.num_experts,)}
        elif self.kind == "softmax":
            shapes = {"weight": (self.num_experts, width)}
        elif self.kind in ("glu", "spectral"):
            shapes = {"gate": (rows, width), "up": (rows, width)}
        else:
            known = "linear, softmax, glu or spectral"
            raise ValueError(f"config.routing.selector {self.kind!r}: {known}")
        self.names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.balance = balance_of(routing, self.num_experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Scores (T, E)."""
        weights = {name: getattr(self, name) for name in self.names}
        return selector_scores(self.kind, weights, x_TD, self.num_experts, self.act_fn)


def balance_of(routing: dict[str, Any], *shape: int) -> nn.Parameter | None:
    """The load-balance bias as a parameter, where the routing has one."""
    if not routing.get("selection_bias"):
        return None
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


class RouterAttention(nn.Module):
    """Causal attention of a router; keys and values live in cache layer L.

    Args:
        config: of the model; heads have the backbone's size and rotary embedding.
        layer_idx: L.
        inputs: width of what it reads.
        outputs: width of what it returns.
        heads: query heads.
        kv_heads: key and value heads; a divisor of `heads`.
        bias: whether the four projections have one.
    """

    def __init__(
        self,
        config: FissileConfig,
        layer_idx: int,
        inputs: int,
        outputs: int,
        heads: int,
        kv_heads: int,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if heads % kv_heads:
            raise ValueError(f"config.routing.router: {heads} query heads, {kv_heads} of keys")
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = head_dim_of(config)
        self.num_key_value_groups, self.scaling = heads // kv_heads, self.head_dim**-0.5
        self.repeats = max(1, config.num_attention_heads // heads)
        self.q_proj = nn.Linear(inputs, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(inputs, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, outputs, bias=bias)
        # engine: compilers do not look into imports, so the backbone's functions are found here.
        stock = stock_module(config)
        self.rotate, self.attend = stock.apply_rotary_pos_emb, stock.eager_attention_forward

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        # engine: as many query heads as the backbone has; copies are dropped again.
        repeats = self.repeats if self.config._attn_implementation in ENGINES else 1
        query = query.repeat_interleave(repeats, dim=1) if repeats > 1 else query
        # engine: exactly one call of the interface, so that it can be found and replaced.
        attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.attend
        )
        out, _ = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        out = out.reshape(*hidden_states.shape[:-1], -1, self.head_dim)[..., ::repeats, :]
        return self.o_proj(out.flatten(-2))


def head_dim_of(config: FissileConfig) -> int:
    """Width of one attention head of the backbone."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class PreGateRouter(nn.Module):
    """One Llama-style block over the token embeddings; decides before layer 0 for all layers.

    logits = down(silu(gate n) * up n), n = [e, attention(w_in * e / rms(e))] * w_out / rms(e).
    Both halves are normalised by the embedding's rms alone: this is the shape that can be lowered
    into one more layer of a stock architecture. Block "token" leaves the attention out: the choice
    depends on the token's id alone, and nothing is kept in the cache.

    Attributes:
        balance: (H, E) added to the logits for the choice alone; None without it.
    """

    def __init__(self, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.routing is not None
        dims, width = config.routing["router"], config.hidden_size
        joint, inner = width, dims["inner_dim"]
        self.heads = config.num_base_layers if config.routing["per_layer"] else 1
        self.num_experts, self.eps = config.routing["num_experts"], config.rms_norm_eps
        self.layers: nn.ModuleDict | None = None
        if dims.get("block", "attention") == "attention":
            joint = width + dims["attention_dim"]
            kv_heads = config.num_key_value_heads
            heads = dims.get("query_heads", kv_heads)
            self.norm_in = nn.Parameter(torch.ones(width))
            # engine: a path to an attention module holds exactly one integer, unique in the model.
            attention = RouterAttention(
                config, layer_idx, width, dims["attention_dim"], heads, kv_heads
            )
            self.layers = nn.ModuleDict({str(layer_idx): attention})
        self.norm_out = nn.Parameter(torch.ones(joint))
        self.gate_proj = nn.Linear(joint, inner, bias=False)
        self.up_proj = nn.Linear(joint, inner, bias=False)
        self.down_proj = nn.Linear(inner, self.heads * self.num_experts, bias=False)
        self.balance = balance_of(config.routing, self.heads, self.num_experts)

    def forward(
        self, inputs_embeds: Tensor, input_ids: Tensor | None = None, **context: Any
    ) -> Tensor:
        """Embeddings (B, S, D) to logits (H, T, E); `input_ids` are not looked at."""
        e = inputs_embeds.float()
        inverse_rms = torch.rsqrt(e.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.layers is not None:
            scaled = (e * inverse_rms * self.norm_in).to(inputs_embeds.dtype)
            attended = next(iter(self.layers.values()))(scaled, **context)
            e = torch.cat([e, attended.float()], dim=-1)
        joint = (e * inverse_rms * self.norm_out).to(inputs_embeds.dtype)
        inner = nn.functional.silu(self.gate_proj(joint)) * self.up_proj(joint)
        return self.down_proj(inner).reshape(-1, self.heads, self.num_experts).transpose(0, 1)


class ReadMeRouter(nn.Module):
    """Read-ME's own router (section 3.2): a small transformer over an embedding table of its own.

    One causal block on token ids: x + attention(norm x), then x + down(silu(up(norm x))), biases
    everywhere, then norm and head. As the paper has it, the scores are divided by sqrt(head size);
    the released training script does not.
    Keys and values have a geometry of their own: `query_heads` heads of the backbone's size.

    Attributes:
        balance: (H, E) added to the logits for the choice alone; None without it.
    """

    def __init__(self, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.routing is not None
        dims = config.routing["router"]
        width, inner, count = dims["width"], dims["inner_dim"], dims.get("query_heads", 4)
        self.heads = config.num_base_layers if config.routing["per_layer"] else 1
        self.num_experts, self.eps = config.routing["num_experts"], config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.norm_in = nn.Parameter(torch.ones(width))
        self.norm_mid = nn.Parameter(torch.ones(width))
        self.norm_out = nn.Parameter(torch.ones(width))
        attention = RouterAttention(config, layer_idx, width, width, count, count, bias=True)
        self.layers = nn.ModuleDict({str(layer_idx): attention})
        self.up_proj = nn.Linear(width, inner)
        self.down_proj = nn.Linear(inner, width)
        self.head = nn.Linear(width, self.heads * self.num_experts)
        self.balance = balance_of(config.routing, self.heads, self.num_experts)

    def forward(
        self, inputs_embeds: Tensor, input_ids: Tensor | None = None, **context: Any
    ) -> Tensor:
        """Token ids (B, S) to logits (H, T, E); `inputs_embeds` are not looked at.

        Raises:
            ValueError: the model was given embeddings instead of ids.
        """
        if input_ids is None:
            raise ValueError("this model's router reads token ids: give input_ids")
        x = self.embed_tokens(input_ids)
        x = x + next(iter(self.layers.values()))(self._norm(x, self.norm_in), **context)
        x = x + self.down_proj(nn.functional.silu(self.up_proj(self._norm(x, self.norm_mid))))
        logits = self.head(self._norm(x, self.norm_out))
        return logits.reshape(-1, self.heads, self.num_experts).transpose(0, 1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale * weight).to(x.dtype)


Router = PreGateRouter | ReadMeRouter


def router_block(config: FissileConfig) -> str | None:
    """Which block decides before layer 0: "attention", "token", "readme", or None."""
    routing = config.routing
    if routing is None or routing["kind"] != "pregate":
        return None
    return str(routing["router"].get("block", "attention"))


def build_router(config: FissileConfig) -> Router | None:
    """The router that decides before layer 0, where the config has one.

    Raises:
        ValueError: an unknown block.
    """
    block = router_block(config)
    if block is None:
        return None
    if block not in ("attention", "token", "readme"):
        raise ValueError(f"config.routing.router.block {block!r}: attention, token or readme")
    router = ReadMeRouter if block == "readme" else PreGateRouter
    return router(config, config.num_base_layers)
