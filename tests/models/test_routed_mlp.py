"""What a routed MLP adds to its experts' sum, against plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fissile import families
from fissile.models.build import dense_config, prepare_parts, with_routing
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.modules_fissile import FissileExperts, RoutedMLP
from fissile.models.routers_fissile import choose
from fissile.refactor.controls import oracle_choice

D, E, K, M, S, T = 24, 5, 2, 8, 16, 40
STOCK: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": S + E * M,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}


def config_of(**extra: Any) -> FissileConfig:
    """A layer-wise routed Llama; `extra` goes into the routing."""
    routing = {
        "kind": "layerwise",
        "num_experts": E,
        "top_k": K,
        "shared_sizes": [S, S],
        "expert_sizes": [M, M],
        "per_layer": False,
        "layout": "disjoint",
        "shared_bias": True,
        **extra,
    }
    return with_routing(dense_config(STOCK, families.FAMILIES["llama"]), routing)


def mlp_of(config: FissileConfig, seed: int = 0) -> RoutedMLP:
    """A random MLP of layer 1, every tensor of it non-zero."""
    prepare_parts(config)
    mlp = RoutedMLP(config, 1).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in mlp.state_dict().items():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5 + 0.1 * ("bias" in name))
    return mlp


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def expert_outputs(mlp: RoutedMLP, x_TD: Tensor) -> Tensor:
    """Every expert's output in float64, (T, E, D)."""
    assert isinstance(mlp.experts, FissileExperts)
    rows = []
    for gate_up, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
        gate, up = (x_TD.double() @ gate_up.double().T).chunk(2, dim=-1)
        rows.append((torch.nn.functional.silu(gate) * up) @ down.double().T)
    return torch.stack(rows, 1)


def shared_output(mlp: RoutedMLP, x_TD: Tensor) -> Tensor:
    assert mlp.shared is not None
    return mlp.shared.double()(x_TD.double())


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_restore_adds_the_means_of_experts_that_are_not_chosen(implementation: str) -> None:
    config = config_of(restore=True)
    mlp, x = mlp_of(config), inputs()
    config._experts_implementation = implementation
    assert mlp.restore is not None
    assert mlp.shared is not None
    mlp.shared.down_proj.bias.copy_(mlp.restore.sum(0))
    assert mlp.selector is not None
    chosen = torch.zeros(T, E, dtype=torch.bool)
    chosen.scatter_(1, mlp.selector(x).topk(K).indices, True)
    got = mlp(x).double()
    bias = mlp.shared.down_proj.bias.double()
    parts = torch.where(chosen[..., None], expert_outputs(mlp, x), mlp.restore.double())
    want = shared_output(mlp, x) - bias + parts.sum(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    # All experts chosen: the bias is taken back whole.
    mlp.shared.float()
    mlp.slots = E
    full = shared_output(mlp, x) - bias + expert_outputs(mlp, x).sum(1)
    mlp.shared.float()
    torch.testing.assert_close(mlp(x).double(), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "glu", "spectral"])
def test_scores_of_every_selector(kind: str) -> None:
    rank = 1 if kind == "linear" else 3
    mlp, x = mlp_of(config_of(selector=kind, selector_rank=rank)), inputs()
    assert mlp.selector is not None
    w = {name: tensor.double() for name, tensor in mlp.selector.state_dict().items()}
    want = torch.zeros(T, E, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for e in range(E):
            if kind == "linear":
                want[t, e] = w["weight"][e] @ row + w["bias"][e]
                continue
            gates = [w["gate"][e * rank + r] @ row for r in range(rank)]
            ups = [w["up"][e * rank + r] @ row for r in range(rank)]
            if kind == "glu":
                parts = [g / (1 + (-g).exp()) * u for g, u in zip(gates, ups, strict=True)]
                want[t, e] = sum(p.abs() for p in parts) / rank
            else:
                quadratic = sum(g * g for g in gates) * sum(u * u for u in ups)
                want[t, e] = quadratic**0.5
    torch.testing.assert_close(mlp.selector(x).double(), want, rtol=1e-4, atol=1e-5)


def test_an_unknown_selector_is_refused() -> None:
    with pytest.raises(ValueError, match="selector 'quadratic': linear, softmax, glu or spectral"):
        RoutedMLP(config_of(selector="quadratic"), 0)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_a_threshold_leaves_weak_experts_out(implementation: str) -> None:
    config = config_of(threshold=[0.0, 0.8], max_k=3, restore=True, selection_bias=True)
    assert config.num_experts_per_tok == 3
    mlp, x = mlp_of(config), inputs()
    config._experts_implementation = implementation
    assert mlp.selector is not None
    assert mlp.selector.balance is not None
    assert mlp.restore is not None
    biased = mlp.selector(x) + mlp.selector.balance
    third = biased.sort(1, descending=True).values[:, 2:3]
    chosen = (biased >= third) & (biased >= 0.8)
    assert set(chosen.sum(1).tolist()) == {0, 1, 2, 3}
    parts = (expert_outputs(mlp, x) - mlp.restore.double()) * chosen[..., None]
    got = mlp(x).double()
    torch.testing.assert_close(got, shared_output(mlp, x) + parts.sum(1), rtol=1e-4, atol=1e-4)


def test_experts_of_weight_zero_are_not_computed() -> None:
    mlp, x = mlp_of(config_of(threshold=[0.0, 1e9], max_k=E)), inputs()
    assert isinstance(mlp.experts, FissileExperts)
    mlp.experts.down_proj.fill_(torch.nan)
    torch.testing.assert_close(mlp(x).double(), shared_output(mlp, x), rtol=1e-4, atol=1e-4)


def test_overlapping_experts_keep_neurons_that_a_zero_weight_shares() -> None:
    blocks = [[[8, [0, 1]], [8, [1, 2]]]] * 2
    routing = {"layout": "membership", "blocks": blocks, "num_experts": 3, "max_k": 2}
    mlp = mlp_of(config_of(**routing, threshold=[0.0, 0.0], shared_sizes=[0, 0]))
    assert mlp.selector is not None
    assert mlp.pool is not None
    mlp.selector.get_parameter("weight").zero_()
    bias = mlp.selector.get_parameter("bias")
    bias.copy_(torch.tensor([1.0, -1.0, -2.0]))  # expert 1 fills a slot, unused
    x = inputs()
    h = mlp.pool.neurons(x)
    h[:, 8:] = 0
    torch.testing.assert_close(mlp(x), mlp.pool.down_proj(h))
    bias.copy_(torch.tensor([1.0, 0.5, -2.0]))
    torch.testing.assert_close(mlp(x), mlp.pool(x, torch.ones(T, 1).long(), torch.ones(T, 1)))


def test_a_balance_moves_choices_and_no_weight() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [0.5, 1.0, 0.9]])
    balance = torch.tensor([-2.5, 0.0, 0.0])
    index, weights = choose(scores, 1, False, balance_E=balance)
    assert index.tolist() == [[1], [1]]
    scores.requires_grad_()
    _, weights = choose(scores, 2, True, balance_E=balance)
    torch.testing.assert_close(weights.detach(), torch.ones(2, 2))
    weights[0, 0].backward()
    assert scores.grad is not None
    p = torch.softmax(scores.detach()[0], 0)
    torch.testing.assert_close(scores.grad[0], p[1] * (torch.eye(3)[1] - p))


def test_every_tensor_of_a_random_model_has_a_value() -> None:
    routers: list[dict[str, Any]] = [
        {"attention_dim": 8, "inner_dim": 8},
        {"block": "token", "inner_dim": 8},
        {"block": "readme", "width": 8, "inner_dim": 8},
    ]
    configs = [config_of(selector="glu", selection_bias=True, restore=True)]
    configs += [config_of(kind="pregate", router=r, selection_bias=True) for r in routers]
    for config in configs:
        for name, tensor in FissileForCausalLM(config).state_dict().items():
            zero = name.endswith((".bias", "balance", "restore"))
            assert bool((tensor == 0).all()) == zero, name
            assert tensor.abs().max() < 2, name


def test_sizes_of_a_router_that_cannot_be_are_refused() -> None:
    router = {"attention_dim": 8, "inner_dim": 8, "query_heads": 3}
    with pytest.raises(ValueError, match="3 query heads, 2 of keys"):
        FissileForCausalLM(config_of(kind="pregate", router=router))
    with pytest.raises(ValueError, match="block 'conv': attention, token or readme"):
        FissileForCausalLM(config_of(kind="pregate", router={"block": "conv", "inner_dim": 8}))


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_oracle_takes_the_largest_outputs(dynamic: bool) -> None:
    config = config_of(threshold=[0.0, 0.0], max_k=4)
    mlp, x = mlp_of(config), inputs()
    outputs = expert_outputs(mlp, x)
    norms = outputs.norm(dim=-1)
    threshold = float(norms.median()) + 1e-3 if dynamic else None
    mlp.override = oracle_choice(mlp, threshold)
    ranks = norms.argsort(1, descending=True).argsort(1)
    chosen = ranks < K if threshold is None else (ranks < 4) & (norms >= threshold)
    assert (len(chosen.sum(1).unique()) > 3) == dynamic
    got = mlp(x).double()
    want = shared_output(mlp, x) + (outputs * chosen[..., None]).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
