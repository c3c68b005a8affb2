"""Tensors of an artifact, derived from its config alone, against those of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fissile import families
from fissile.errors import CorruptCheckpoint
from fissile.families.artifact import artifact_tensors
from fissile.io.headers import open_checkpoint_headers
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter
from fissile.kernels.layout import part_shape, stored_names
from fissile.models.build import dense_config, empty_model, with_nested, with_routing
from fissile.models.configuration_fissile import FissileConfig

STOCK = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "olmo2": transformers.Olmo2Config,
}
EXPERTS = {
    "num_experts": 3,
    "top_k": 2,
    "shared_sizes": [64, 32],
    "expert_sizes": [32, 64],
    "per_layer": False,
    "layout": "disjoint",
    "shared_bias": True,
    "router": {"attention_dim": 8, "inner_dim": 24},
}
POOLED = {"layout": "membership", "blocks": [[[32, [0]], [64, [1, 2]]], [[64, [0, 1]], [32, []]]]}
ROUTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "pregate": {**EXPERTS, "kind": "pregate"},
    "per layer": {**EXPERTS, "kind": "pregate", "per_layer": True},
    "layerwise": {**EXPERTS, "kind": "layerwise", "shared_bias": False},
    "static": {**EXPERTS, "kind": "static"},
    "no shared": {**EXPERTS, "kind": "layerwise", "shared_sizes": [0, 0], "shared_bias": False},
    "pool": {**EXPERTS, **POOLED, "kind": "layerwise"},
    "restore": {**EXPERTS, "kind": "layerwise", "restore": True},
    "spectral": {**EXPERTS, "kind": "layerwise", "selector": "spectral", "selector_rank": 3},
    "glu": {**EXPERTS, "kind": "layerwise", "selector": "glu", "selection_bias": True},
    "balance": {**EXPERTS, "kind": "layerwise", "selection_bias": True},
    "few heads": {
        **EXPERTS,
        "kind": "pregate",
        "router": {"attention_dim": 8, "inner_dim": 24, "query_heads": 2},
        "selection_bias": True,
    },
    "token": {**EXPERTS, "kind": "pregate", "router": {"block": "token", "inner_dim": 24}},
    "readme": {
        **EXPERTS,
        "kind": "pregate",
        "router": {"block": "readme", "width": 12, "inner_dim": 24, "query_heads": 4},
        "per_layer": True,
        "selection_bias": True,
    },
}


def config_of(family: str, routing: dict[str, Any] | None) -> FissileConfig:
    """A tiny Fissile config with a backbone of the family."""
    stock = STOCK[family](
        vocab_size=48,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
    )
    config = dense_config(stock.to_dict(), families.FAMILIES[family])
    return with_routing(config, routing)


def stored(config: FissileConfig) -> dict[str, Any]:
    """config.json of an artifact."""
    return json.loads(json.dumps({**config.to_dict(), "model_type": "fissile"}))


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_float_tensors_are_the_state_dict(family: str, routing: str) -> None:
    config = config_of(family, ROUTINGS[routing])
    state = {name: tuple(t.shape) for name, t in empty_model(config).state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight")
    fields = stored(config)
    assert families.find(fields).name == family
    found = dict(artifact_tensors(families.find(fields), fields))
    assert {name: shape for name, (_, shape) in found.items()} == state
    assert {dtype for dtype, _ in found.values()} == {None}


def nested(config: FissileConfig, widths: list[int]) -> FissileConfig:
    """Nest every linear of the layers; layer 1 in smaller groups."""
    family = families.FAMILIES[config.backbone["family"]]
    names = [
        name
        for name, (_, shape) in artifact_tensors(family, stored(config))
        if ".layers." in name and len(shape) > 1 and "router" not in name and "selector" not in name
    ]
    groups = {name: 16 for name in names if "layers.1." in name}
    entry = {"layout": 1, "widths": widths, "group_size": 32, "groups": groups, "modules": names}
    return with_nested(config, entry, widths[-1])


@pytest.mark.parametrize("widths", [[2, 3, 4], [2, 3], [4]])
def test_nested_tensors_follow_the_layout(widths: list[int]) -> None:
    config = nested(config_of("llama", ROUTINGS["pregate"]), widths)
    family = families.FAMILIES["llama"]
    assert config.nested is not None
    floats = dict(artifact_tensors(family, stored(config_of("llama", ROUTINGS["pregate"]))))
    found = dict(artifact_tensors(family, stored(config)))
    for name in config.nested["modules"]:
        group = config.nested["groups"].get(name, 32)
        assert name not in found
        own = [n.rpartition(".")[2] for n in found if n.startswith(f"{name}.")]
        assert tuple(own) == stored_names(widths)
        for part in own:
            dtype, shape = found[f"{name}.{part}"]
            assert shape == part_shape(part, floats[name][1], group)
            assert dtype == ("I16" if part.startswith("theta") else "U8")
    plain = floats.keys() - {*config.nested["modules"]}
    assert plain == {n for n in found if ".plane_" not in n and ".theta_" not in n}


def write(folder: Path, config: FissileConfig) -> None:
    fields = stored(config)
    (folder / "config.json").write_text(json.dumps(fields))
    found = dict(artifact_tensors(families.find(fields), fields))
    plan = [PlannedTensor(n, dtype or "BF16", shape) for n, (dtype, shape) in found.items()]
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    with ShardWriter(folder, plan, 1 << 30) as writer:
        for tensor in plan:
            writer.write(tensor.name, torch.zeros(tensor.shape, dtype=dtypes[tensor.dtype]))


def check(folder: Path) -> None:
    headers = open_checkpoint_headers(folder)
    families.check_checkpoint(headers, families.find(headers.config))


def test_artifacts_are_checked_from_headers(tmp_path: Path) -> None:
    config = nested(config_of("llama", ROUTINGS["pregate"]), [2, 3, 4])
    write(tmp_path, config)
    check(tmp_path)
    fields = stored(config)
    fields["nested"]["group_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        CorruptCheckpoint, match=r"theta_2 has shape \[64, 2, 2\], expected \[64, 4"
    ):
        check(tmp_path)
    fields["nested"] = {"modules": fields["nested"]["modules"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CorruptCheckpoint, match=r"nested is malformed \(KeyError: 'group_size'\)"):
        check(tmp_path)
    assert not families.explain_source(tmp_path)[-1].ok
    fields["routing"] = {"kind": "pregate"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CorruptCheckpoint, match=r"routing is malformed \(KeyError"):
        check(tmp_path)
