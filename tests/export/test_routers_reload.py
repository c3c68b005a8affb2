"""Every router through the files: written, reloaded, equal to what was written, checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fissile import models
from fissile.export.artifact import write_artifact
from fissile.export.verify import verify
from fissile.io.manifest import Origin
from fissile.models.build import with_routing
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.source import CheckpointSource, load_source

SIZES = {
    "num_experts": 4,
    "top_k": 2,
    "shared_sizes": [64, 64],
    "expert_sizes": [48, 48],
    "per_layer": False,
    "layout": "disjoint",
    "shared_bias": True,
}
DYNAMIC = {"threshold": [0.4, 0.6], "max_k": 4, "restore": True, "selection_bias": True}
ROUTERS: dict[str, dict[str, Any]] = {
    "spectral": {"kind": "layerwise", "selector": "spectral", "selector_rank": 3, **DYNAMIC},
    "glu": {"kind": "layerwise", "selector": "glu"},
    "few heads": {
        "kind": "pregate",
        "router": {"attention_dim": 16, "inner_dim": 16, "query_heads": 2},
        **DYNAMIC,
    },
    "token": {"kind": "pregate", "router": {"block": "token", "inner_dim": 16}},
    "readme": {
        "kind": "pregate",
        "router": {"block": "readme", "width": 24, "inner_dim": 16},
        "per_layer": True,
        "selection_bias": True,
    },
}
FRESH = ("spectral",)
"""Also loaded in a process without fissile."""


class Assembled:
    """The tiny model's attention with random routed FFNs."""

    def __init__(self, dense: CheckpointSource, routing: dict[str, Any]) -> None:
        self.config = with_routing(dense.config, routing)
        torch.manual_seed(0)
        self._state = FissileForCausalLM(self.config).state_dict()
        for name, tensor in self._state.items():
            if ".mlp." in name or ".router." in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.3 + 0.2)
        self._dense = dense

    def layer_state(self, layer_idx: int) -> dict[str, Tensor]:
        prefix = f"model.layers.{layer_idx}."
        own = {k.removeprefix(prefix): v for k, v in self._state.items() if k.startswith(prefix)}
        dense = self._dense.layer_state(layer_idx)
        return own | {k: v for k, v in dense.items() if not k.startswith("mlp.")}

    def outer_state(self) -> dict[str, Tensor]:
        own = {k: v for k, v in self._state.items() if k.startswith("model.router.")}
        return own | self._dense.outer_state()


def tensor_of(source: Assembled, name: str) -> Tensor:
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return source.layer_state(int(index))[rest] if index.isdigit() else source.outer_state()[name]


@pytest.mark.parametrize("name", ROUTERS)
def test_reloaded_router_decides_as_before(name: str, tiny_model: Path, tmp_path: Path) -> None:
    dense = CheckpointSource(tiny_model)
    source = Assembled(dense, {**SIZES, **ROUTERS[name]})
    out = tmp_path / "artifact"
    write_artifact(
        out,
        source.config,
        dense.family,
        lambda tensor: tensor_of(source, tensor),
        source=tiny_model,
        dtype="float32",
        max_shard_bytes=1 << 30,
        origin=Origin(source={"name": "tiny"}),
        card=lambda folder: "card",
    )
    ids = torch.randint(3, 8192, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = load_source(source)(ids).logits
        loaded = models.load(out)
        got = loaded(ids).logits
        again = load_source(CheckpointSource(out))(ids).logits
    assert torch.equal(got, want)
    assert torch.equal(again, want)
    state = loaded.state_dict()
    router = [key for key in state if ".router." in key or ".selector." in key or "restore" in key]
    assert len(router) > 3
    assert all(torch.equal(state[key], tensor_of(source, key)) for key in router)
    if name in FRESH:
        assert verify(out).ok


def test_without_the_optional_keys_there_are_as_many_queries_as_keys(tiny_model: Path) -> None:
    routing = {**SIZES, **ROUTERS["few heads"]}
    old = {k: v for k, v in routing.items() if k not in DYNAMIC}
    old["router"] = {"attention_dim": 16, "inner_dim": 16}
    config = with_routing(CheckpointSource(tiny_model).config, old)
    stored = json.loads(json.dumps(config.to_dict()))
    assert stored["routing"] == old
    model = FissileForCausalLM(config)
    attention = "model.router.layers.2.{}_proj.weight"
    assert model.state_dict()[attention.format("q")].shape == (32, 64)
    assert model.state_dict()[attention.format("k")].shape == (32, 64)
    assert not [n for n in model.state_dict() if n.endswith(("balance", "restore"))]
