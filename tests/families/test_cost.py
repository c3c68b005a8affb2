"""Costs derived from a config against parameters and products counted in the running model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fissile import families
from fissile.families.cost import model_cost, router_cost
from fissile.models.build import dense_config, with_routing
from fissile.models.modeling_fissile import FissileForCausalLM

STOCK: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 48,
}
EXPERTS = {
    "num_experts": 3,
    "top_k": 2,
    "shared_sizes": [64, 32],
    "expert_sizes": [32, 32],
    "per_layer": False,
    "layout": "disjoint",
    "shared_bias": True,
    "router": {"attention_dim": 8, "inner_dim": 24, "query_heads": 2},
    "selection_bias": True,
}
ROUTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "attention": {**EXPERTS, "kind": "pregate", "restore": True},
    "per layer": {**EXPERTS, "kind": "pregate", "per_layer": True},
    "token": {**EXPERTS, "kind": "pregate", "router": {"block": "token", "inner_dim": 24}},
    "readme": {
        **EXPERTS,
        "kind": "pregate",
        "router": {"block": "readme", "width": 12, "inner_dim": 24, "query_heads": 4},
    },
    "linear": {**EXPERTS, "kind": "layerwise"},
    "spectral": {**EXPERTS, "kind": "layerwise", "selector": "spectral", "selector_rank": 5},
    "static": {**EXPERTS, "kind": "static"},
}
TOKENS = 20


def products(model: torch.nn.Module, *args: Any, **kwargs: Any) -> float:
    """Multiply-accumulates per token of matrix products with weights, as they are carried out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    counts = counter.get_flop_counts()["Global"]
    weights = {torch.ops.aten.mm, torch.ops.aten.addmm}  # scores of attention are bmm
    return sum(n for op, n in counts.items() if op in weights) / 2 / TOKENS


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_costs_are_those_of_the_running_model(name: str, tied: bool) -> None:
    family = families.FAMILIES["llama"]
    stock = {**STOCK, "tie_word_embeddings": tied}
    config = with_routing(dense_config(stock, family), ROUTINGS[name])
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = FissileForCausalLM(config).eval()
    ids = torch.randint(0, 48, (1, TOKENS))
    whole = model_cost(config.to_dict())
    assert whole.parameters == sum(p.numel() for p in model.parameters())
    assert whole.macs == pytest.approx(products(model, ids))
    routers = [m for n, m in model.named_modules() if n.endswith((".router", ".selector"))]
    routers = [m for m in routers if m is not None]
    own = router_cost(config.to_dict())
    assert own.parameters == sum(p.numel() for m in routers for p in m.parameters())
    if name in ("dense", "static"):
        assert (own.parameters, own.macs) == (0, 0.0)
        return
    if ROUTINGS[name]["kind"] == "pregate":  # type: ignore[index]
        linears = [m for r in routers for m in r.modules() if isinstance(m, torch.nn.Linear)]
        assert own.macs == sum(m.in_features * m.out_features for m in linears)
    else:
        x = torch.randn(TOKENS, 64)
        assert own.macs == sum(products(m, x) for m in routers)
    assert own.macs > 0


def test_overlapping_experts_cost_what_their_blocks_hold() -> None:
    blocks = [[[32, [0]], [64, [1, 2]]], [[64, [0, 1]], [32, [2]]]]
    config = with_routing(
        dense_config(STOCK, families.FAMILIES["llama"]),
        {**EXPERTS, "kind": "layerwise", "layout": "membership", "blocks": blocks, "top_k": 1},
    )
    dense = model_cost(with_routing(config, None).to_dict())
    found = model_cost(config.to_dict())
    routers = router_cost(config.to_dict())
    # Mean size of an expert: (32 + 64 + 64) / 3 neurons in both layers.
    active = 64 + 32 + 2 * 160 / 3
    ffn = 3 * 64
    assert found.macs - routers.macs == pytest.approx(dense.macs + ffn * (active - 2 * 160))
