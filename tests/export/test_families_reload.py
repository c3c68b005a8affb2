"""Every family through the files: dense folder to routed artifact, reloaded, equal to the dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fissile import families, models
from fissile.config import Route
from fissile.export.artifact import write_artifact
from fissile.export.verify import fresh_logits
from fissile.io.manifest import Origin, check_manifest
from fissile.models.source import CheckpointSource
from fissile.refactor.convert import ConvertedSource, routing_of
from fissile.refactor.partition import Partition

DENSE = [family for family in families.FAMILIES.values() if family.experts is None]
TYPES = sorted(t for family in DENSE for t in family.model_types)
FRESH = ("gemma3_text", "phi3", "olmo2")
"""Types that are also loaded in a process without fissile; one per norm layout."""
DIMS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@pytest.mark.parametrize("model_type", TYPES)
def test_reloaded_artifact_equals_the_dense_model(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(TYPES.index(model_type))
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **DIMS)).eval()
    for parameter in stock.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    stock.save_pretrained(tmp_path / "dense", max_shard_size="60kB")
    source = CheckpointSource(tmp_path / "dense")
    partitions = [Partition(torch.randperm(128), 32, 24, 4) for _ in range(2)]
    settings = Route(attention_dim=16, inner_dim=16)
    routing = routing_of("layerwise", partitions, 4, settings)
    selectors = [
        {"selector.weight": torch.randn(4, 64), "selector.bias": torch.randn(4)} for _ in range(2)
    ]
    routed = ConvertedSource(source, partitions, routing, selectors=selectors)
    layers = [routed.layer_state(i) for i in range(2)]
    outer = routed.outer_state()

    def provide(name: str) -> torch.Tensor:
        if name in outer:
            return outer[name]
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        return layers[int(index)][rest]

    write_artifact(
        tmp_path / "artifact",
        routed.config,
        source.family,
        provide,
        source=source.folder,
        dtype="float32",
        max_shard_bytes=100_000,
        origin=Origin(source={"name": model_type}),
        card=lambda folder: "card",
    )
    assert check_manifest(tmp_path / "artifact") == []
    assert len(list((tmp_path / "artifact").glob("model-*.safetensors"))) > 1
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = stock(ids).logits
        got = models.load(tmp_path / "artifact")(ids).logits
    assert (got - want).abs().max() < 1e-4
    if model_type in FRESH:
        assert torch.equal(fresh_logits(tmp_path / "artifact", ids, [0])["logits_0"], got)
