"""What a model computes, against counting it by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fissile import families
from fissile.models.build import dense_config, prepare_parts, with_routing
from fissile.models.modules_fissile import RoutedMLP
from fissile.run.active import counting_active

D, E, SHARED, SIZES = 24, 5, (16, 26), (8, 6)
STOCK: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


def routed_mlps() -> nn.ModuleList:
    routing = {
        "kind": "layerwise",
        "num_experts": E,
        "top_k": 3,
        "shared_sizes": list(SHARED),
        "expert_sizes": list(SIZES),
        "per_layer": False,
        "layout": "disjoint",
    }
    config = with_routing(dense_config(STOCK, families.FAMILIES["llama"]), routing)
    prepare_parts(config)
    mlps = nn.ModuleList(RoutedMLP(config, i).eval().requires_grad_(False) for i in (0, 1))
    for parameter in mlps.parameters():
        parameter.zero_()
    return mlps


def fixed(weights_TK: Tensor) -> Any:
    return lambda x_TD: (torch.tensor([[0, 1, 2]]).expand(len(x_TD), -1), weights_TK)


def test_chosen_neurons_are_counted_and_those_below_the_threshold_are_not() -> None:
    mlps = routed_mlps()
    some = torch.ones(6, 3)
    some[1, 2] = some[4] = 0
    with counting_active(mlps) as active:
        for mlp, weights in zip(mlps, (some, torch.ones(6, 3)), strict=True):
            mlp.override = fixed(weights)
            mlp(torch.zeros(1, 6, D))
        # More text: two tokens with three experts each, then with none.
        for mlp, weights in zip(mlps, (torch.ones(2, 3), torch.zeros(2, 3)), strict=True):
            mlp.override = fixed(weights)
            mlp(torch.zeros(1, 2, D))
    mlps[0](torch.zeros(1, 2, D))
    chosen = (14 + 6) * SIZES[0] + 18 * SIZES[1]
    assert active.share(sum(SHARED), 2 * 56) == (chosen / 8 + sum(SHARED)) / 112


def test_a_model_without_experts_has_no_share() -> None:
    with counting_active(nn.Linear(2, 2)) as active:
        assert active.share(1, 2) is None
