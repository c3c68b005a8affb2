"""Every family: a tiny random model, converted with all experts active, equals the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
VARIANTS: dict[str, dict[str, Any]] = {
    "one block": {},
    "many heads": {"router": {"attention_dim": 16, "inner_dim": 16, "query_heads": 4}},
    "per layer": {"per_layer": True, "selection_bias": True},
    "threshold": {"threshold": [-600.0, 0.0, 600.0], "max_k": 3, "restore": True},
    "token": {"router": {"block": "token", "inner_dim": 16}, "selection_bias": True},
    "readme": {"router": {"block": "readme", "width": 24, "inner_dim": 16, "query_heads": 4}},
}
"""Routers that decide before layer 0; entries of `routing`."""
SHARED, EXPERTS, SIZE = 32, 4, 24
DENSE = [family for family in families.FAMILIES.values() if family.experts is None]
TYPES = sorted(t for family in DENSE for t in family.model_types)


def stock_model(model_type: str) -> Any:
    """A random stock model whose every tensor matters, norms included."""
    torch.manual_seed(TYPES.index(model_type))
    config = AutoConfig.for_model(model_type, **DIMS, **EXTRA.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.2 if parameter.ndim > 1 else parameter.data + noise * 0.1
    return model


def converted(stock: Any, kind: str, top_k: int, **extra: Any) -> FissileForCausalLM:
    """The stock model with its neurons shuffled into shared and routed experts.

    Args:
        stock: any model of a known family.
        kind: of the routing.
        top_k: experts per token.
        extra: more entries of `routing`.
    """
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
        **extra,
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
        if "restore" in extra:
            state[prefix + "restore"] = torch.randn(EXPERTS, down.shape[0])
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


def assert_cache_and_padding_do_not_matter(model: FissileForCausalLM) -> None:
    """Token by token with the cache, and in a padded batch, the router sees what it sees alone."""
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
def test_cache_and_left_padding(model_type: str) -> None:
    assert_cache_and_padding_do_not_matter(converted(stock_model(model_type), "pregate", 1))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "one block"])
def test_cache_and_left_padding_of_every_router(variant: str) -> None:
    model = converted(stock_model("llama"), "pregate", 1, **VARIANTS[variant])
    assert model.config.num_hidden_layers == (3 if variant == "token" else 4)
    assert_cache_and_padding_do_not_matter(model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_router_chooses_by_token_and_place(variant: str) -> None:
    """Routes differ between tokens; all but those of "token" depend on what came before."""
    model = converted(stock_model("llama"), "pregate", 1, **VARIANTS[variant])
    assert model.model.router is not None
    logits: list[Tensor] = []
    model.model.router.register_forward_hook(lambda _m, _a, out: logits.append(out))
    ids = ids_of(1, 20)
    other = ids.clone()
    other[0, 3] = 5 + (ids[0, 3] == 5)
    with torch.no_grad():
        model(ids)
        model(other)
    changed = (logits[0] - logits[1]).abs().amax((0, 2)) > 1e-6
    later = [False] * 16 if variant == "token" else [True] * 16
    assert changed.tolist() == [False] * 3 + [True] + later
    assert len(logits[0][0].argmax(-1).unique()) > 1


def test_routes_of_a_threshold_differ_between_layers() -> None:
    model = converted(stock_model("llama"), "pregate", 1, **VARIANTS["threshold"])
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        mlp = layer.get_submodule("mlp")
        mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    with torch.no_grad():
        model(ids_of(2, 20))
    counts = [weights.sum(1) for _, weights in seen]
    assert all(weights.shape == (40, 3) for _, weights in seen)
    assert counts[0].mean() > counts[1].mean() > counts[2].mean()
    assert len(counts[1].unique()) > 1


def test_every_layer_follows_its_own_head() -> None:
    model = converted(stock_model("llama"), "pregate", 2, **VARIANTS["per layer"])
    router = model.model.router
    assert router is not None
    assert router.balance is not None
    logits: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    router.register_forward_hook(lambda _m, _a, out: logits.append(out))
    for layer in model.model.layers:
        mlp = layer.get_submodule("mlp")
        mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    router.balance.mul_(500.0)
    with torch.no_grad():
        model(ids_of(2, 20))
    chosen = [index.sort(1).values for index, _ in seen]
    for head, (index, balance) in enumerate(zip(chosen, router.balance, strict=True)):
        want = (logits[0][head] + balance).topk(2, dim=1).indices.sort(1).values
        assert torch.equal(index, want)
    assert not torch.equal(chosen[0], chosen[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_implementations_agree(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's attention, which knows the backbone's number of heads alone, included."""
    model = converted(stock_model("llama"), "pregate", 1, **VARIANTS[variant])
    heads: list[int] = []

    def engine(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kw: Any) -> Any:
        heads.append(query.shape[1])
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=kw["scaling"]
        )
        return out.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", engine)
    ids, found = ids_of(2, 20), []
    for name in ("eager", "sdpa", "vllm"):
        model.config._attn_implementation = name
        with torch.no_grad():
            found.append(model(ids, attention_mask=None).logits)
    assert (found[1] - found[0]).abs().max() < 1e-4
    assert (found[2] - found[0]).abs().max() < 1e-4
    assert set(heads) == {DIMS["num_attention_heads"]}


def test_read_mes_router_needs_ids() -> None:
    model = converted(stock_model("llama"), "pregate", 1, **VARIANTS["readme"])
    embeds = model.model.embed_tokens(ids_of(1, 4))
    with pytest.raises(ValueError, match="reads token ids: give input_ids"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("model_type", TYPES)
def test_streamed_layers_equal_the_whole_model(model_type: str) -> None:
    assert_streamed_equals_whole(converted(stock_model(model_type), "pregate", 2))


@pytest.mark.parametrize("variant", VARIANTS)
def test_streamed_routers_equal_the_whole_model(variant: str) -> None:
    assert_streamed_equals_whole(converted(stock_model("llama"), "pregate", 2, **VARIANTS[variant]))


def assert_streamed_equals_whole(model: FissileForCausalLM) -> None:
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    streamed = StreamedModel(MemorySource(model.config, state))
    ids = ids_of(2, 20)
    with torch.no_grad():
        assert (streamed.forward(ids) - model(ids).logits).abs().max() < 1e-5
