"""Every family: a tiny random model, converted with all experts active, equals the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fissile import families
from fissile.models.build import dense_config, with_routing
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.source import MemorySource, load_source
from fissile.models.stream import StreamedModel

DIMS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXTRA: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {"sliding_window": None},
    "olmo2": {"tie_word_embeddings": True},
}
SHARED, EXPERTS, SIZE = 32, 4, 24
TYPES = sorted(t for family in families.FAMILIES.values() for t in family.model_types)


def stock_model(model_type: str) -> Any:
    """A random stock model whose every tensor matters, norms included."""
    torch.manual_seed(TYPES.index(model_type))
    config = AutoConfig.for_model(model_type, **DIMS, **EXTRA.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.2 if parameter.ndim > 1 else parameter.data + noise * 0.1
    return model


def converted(stock: Any, kind: str, top_k: int) -> FissileForCausalLM:
    """The stock model with its neurons shuffled into shared and routed experts."""
    config = stock.config.to_dict()
    family = families.find(config)
    source = stock.state_dict()
    layers = config["num_hidden_layers"]
    routing = {
        "kind": kind,
        "num_experts": EXPERTS,
        "top_k": top_k,
        "shared_sizes": [SHARED] * layers,
        "expert_sizes": [SIZE] * layers,
        "per_layer": False,
        "layout": "disjoint",
        "router": {"attention_dim": 16, "inner_dim": 16},
    }
    state: dict[str, Tensor] = {}
    for name, place in families.dense_names(family, config):
        tensor = source[place.name]
        state[name] = tensor if place.rows is None else tensor[slice(*place.rows)]
    for i in range(layers):
        prefix = f"model.layers.{i}.mlp."
        gate, up, down = (
            state.pop(f"{prefix}shared.{n}_proj.weight") for n in ("gate", "up", "down")
        )
        order = torch.randperm(len(gate))
        gate, up, down = gate[order], up[order], down[:, order]
        state[prefix + "shared.gate_proj.weight"] = gate[:SHARED]
        state[prefix + "shared.up_proj.weight"] = up[:SHARED]
        state[prefix + "shared.down_proj.weight"] = down[:, :SHARED]
        pairs = zip(gate[SHARED:].split(SIZE), up[SHARED:].split(SIZE), strict=True)
        state[prefix + "experts.gate_up_proj"] = torch.stack([torch.cat(p) for p in pairs])
        state[prefix + "experts.down_proj"] = torch.stack(down[:, SHARED:].split(SIZE, dim=1))
        if kind == "layerwise":
            state[prefix + "selector.weight"] = torch.randn(EXPERTS, down.shape[0])
            state[prefix + "selector.bias"] = torch.randn(EXPERTS)
    routed = with_routing(dense_config(config, family), routing)
    if kind == "pregate":
        model = FissileForCausalLM(routed)
        assert model.model.router is not None
        for name, tensor in model.model.router.state_dict().items():
            scale = 0.3 if tensor.ndim > 1 else 0.1
            state[f"model.router.{name}"] = torch.randn_like(tensor) * scale + (tensor.ndim == 1)
    return load_source(MemorySource(routed, state))


def ids_of(*shape: int) -> Tensor:
    return torch.randint(3, DIMS["vocab_size"], shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("kind", ["pregate", "layerwise"])
def test_all_experts_active_equals_the_stock_model(model_type: str, kind: str) -> None:
    stock = stock_model(model_type)
    ids = ids_of(2, 20)
    with torch.no_grad():
        want = stock(ids).logits
        got = converted(stock, kind, EXPERTS)(ids).logits
        fewer = converted(stock, kind, 1)(ids).logits
    assert (got - want).abs().max() < 1e-4
    # Leaving experts out must show, or the equality above says nothing about them.
    assert (fewer - want).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", TYPES)
def test_cache_and_left_padding(model_type: str) -> None:
    """Token by token with the cache, and in a padded batch, the router sees what it sees alone."""
    model = converted(stock_model(model_type), "pregate", 1)
    ids = ids_of(2, 20)
    with torch.no_grad():
        full = model(ids).logits
        step = model(ids[:, :12], use_cache=True)
        rows, cache = [step.logits], step.past_key_values
        for t in range(12, 20):
            rows.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(rows, 1) - full).abs().max() < 1e-4
    prompts = [ids[0, :5], ids[0, :9], ids[1, :13]]
    batch = torch.full((3, 13), DIMS["pad_token_id"])
    mask = torch.zeros_like(batch)
    for i, prompt in enumerate(prompts):
        batch[i, 13 - len(prompt) :], mask[i, 13 - len(prompt) :] = prompt, 1
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, attention_mask=mask, **options)[:, 13:]
    for i, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], **options)[0, len(prompt) :]
        assert torch.equal(together[i], alone)


@pytest.mark.parametrize("model_type", TYPES)
def test_streamed_layers_equal_the_whole_model(model_type: str) -> None:
    model = converted(stock_model(model_type), "pregate", 2)
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    streamed = StreamedModel(MemorySource(model.config, state))
    ids = ids_of(2, 20)
    with torch.no_grad():
        assert (streamed.forward(ids) - model(ids).logits).abs().max() < 1e-5
