"""Converted models for the tests of exports: real backbones, arbitrary experts and routers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.config import Route
from fissile.export.artifact import write_artifact
from fissile.families.artifact import float_shapes, router_shapes
from fissile.io.manifest import Origin
from fissile.models.build import with_nested
from fissile.models.source import CheckpointSource
from fissile.quant.baselines import rtn
from fissile.refactor.convert import ConvertedSource, routing_of
from fissile.refactor.domains import MembershipPartition
from fissile.refactor.partition import Partition

EXPERTS = 4


def convert(
    dense: Path,
    kind: Literal["pregate", "layerwise", "static"],
    top_k: int,
    *,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
    settings: Route | None = None,
    bias: float = 1.0,
    shares: tuple[int, ...] = (0, 2),
    overlap: bool = False,
) -> ConvertedSource:
    """A routed model: shuffled neurons, shared sizes that differ from layer to layer.

    Args:
        dense: the dense checkpoint.
        kind: of the routing.
        top_k: experts per token.
        seed: of everything random.
        extra: more entries of `routing`.
        settings: sizes of a router before layer 0.
        bias: size of a layer-wise router's biases.
        shares: shared neurons of even and odd layers, in quarters of the FFN.
        overlap: experts share neurons.
    """
    generator = torch.Generator().manual_seed(seed)
    source = CheckpointSource(dense)
    config, ffn = source.config, source.config.intermediate_size
    parts: list[Any] = []
    for i in range(config.num_base_layers):
        shared = ffn * shares[i % len(shares)] // 4
        order = torch.randperm(ffn, generator=generator)
        size = (ffn - shared) // EXPERTS
        if overlap:
            blocks = ((size, (0, 1)), (size, (1, 2, 3)), (2 * size, (0, 3)))
            parts.append(MembershipPartition(order, shared, blocks, EXPERTS))
        else:
            parts.append(Partition(order, shared, size, EXPERTS))
    settings = settings or Route(attention_dim=16, inner_dim=24)
    routing = {**routing_of(kind, parts, top_k, settings), "shared_bias": False, **(extra or {})}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    selectors = [
        {
            "selector.weight": random(EXPERTS, config.hidden_size) * 0.3,
            "selector.bias": random(EXPERTS) * bias,
            **({"selector.balance": random(EXPERTS)} if "selection_bias" in routing else {}),
        }
        for _ in parts
    ]
    router = {
        name: random(*shape) * _spread(name, shape) + name.startswith("norm")
        for name, shape in _router_shapes(source, routing).items()
    }
    return ConvertedSource(
        source,
        parts,
        routing,
        router=router or None,
        selectors=selectors if kind == "layerwise" else None,
    )


def _spread(name: str, shape: tuple[int, ...]) -> float:
    """Size of a router's random tensors; a balance large enough to change choices."""
    if name == "balance":
        return 30.0
    return 0.3 if len(shape) > 1 else 0.1


def _router_shapes(source: CheckpointSource, routing: dict[str, Any]) -> dict[str, Any]:
    fields = {**source.config.to_dict(), "routing": routing}
    return router_shapes(source.family, fields)


def write(
    model: ConvertedSource,
    out: Path,
    *,
    group: int | None = None,
    dtype: str = "float32",
    widths: tuple[int, ...] = (4,),
) -> Path:
    """Write an artifact; with `group`, every linear is rounded to 4 bits.

    For the files any floats will do: those of 4 bits serve all `widths`.
    """
    source: CheckpointSource = model.dense  # type: ignore[assignment]
    config = with_nested(model.config, None, None)
    parts: dict[str, Tensor] = {}
    names = [n for n, _ in float_shapes(source.family, config.to_dict())]
    wanted = [n for n in names if "proj" in n and ".router." not in n and "bias" not in n]
    if group is not None:
        nested = {
            "layout": 1,
            "widths": list(widths),
            "group_size": group,
            "groups": {},
            "modules": wanted,
        }
        config = with_nested(model.config, nested, 4)
        for name in wanted:
            coded = rtn(tensor_of(model, name), 4, group).parts()
            coded |= {f"theta_{k}": coded["theta_4"] for k in widths}
            parts |= {f"{name}.{suffix}": part for suffix, part in coded.items()}
    write_artifact(
        out,
        config,
        source.family,
        lambda name: parts[name] if name in parts else tensor_of(model, name),
        source=source.folder,
        dtype=dtype,
        max_shard_bytes=10**9,
        origin=Origin(source={"name": "test"}),
        card=lambda _folder: "card",
    )
    return out


def with_plan(folder: Path, artifact: Path, mixed: dict[str, Any]) -> Path:
    """A copy of a nested artifact whose weights have widths of their own."""
    shutil.copytree(artifact, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["nested"]["mixed"], config["bits"] = mixed, None
    path.write_text(json.dumps(config), encoding="utf-8")
    return folder


def plan_of(
    artifact: Path, experts: Callable[[int], int | list[int]], attention: int = 4, shared: int = 3
) -> dict[str, Any]:
    """Widths of all nested weights of an artifact; `experts` of those in a layer's stacks."""
    mixed: dict[str, Any] = {}
    config = json.loads((artifact / "config.json").read_text(encoding="utf-8"))
    for name in config["nested"]["modules"]:
        mixed[name] = attention if "self_attn" in name else shared
        if ".experts." in name:
            mixed[name] = experts(int(name.split(".")[2]))
    return mixed


def tensor_of(model: ConvertedSource, name: str) -> Tensor:
    """One tensor by its canonical name."""
    if not name.startswith("model.layers."):
        return model.outer_state()[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return model.layer_state(int(index))[rest]
