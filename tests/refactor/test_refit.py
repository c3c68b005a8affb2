"""The re-fit on a routed tiny model: what it promises, in all its forms, is what the model does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fissile.config import Route
from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.refactor.compensate import is_held_out
from fissile.refactor.convert import AnyPartition, ConvertedSource, routing_of
from fissile.refactor.domains import domain_masks, membership_partition
from fissile.refactor.partition import random_partition
from fissile.refactor.refit import RefitLayer, Scope, Target, apply_refit, refit_layers

EXPERTS, CHOSEN, LENGTH = 4, 2, 16


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 8192, (64, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def dense(tiny_model: Path) -> StreamedModel:
    return StreamedModel(CheckpointSource(tiny_model))


def routed(dense: StreamedModel, overlapping: bool = False) -> ConvertedSource:
    """Layer-wise routing by random linear routers."""
    rng = torch.Generator().manual_seed(1)
    width = dense.config.intermediate_size
    if overlapping:
        masks = domain_masks(torch.rand(EXPERTS, width, generator=rng), width // 2)
        partitions: list[AnyPartition] = [membership_partition(masks)] * dense.num_layers
    else:
        shared = width // 2
        partitions = [
            random_partition(
                torch.rand(width, generator=rng), shared_size=shared, num_experts=EXPERTS, seed=i
            )
            for i in range(dense.num_layers)
        ]
    selectors = [
        {
            "selector.weight": torch.randn(EXPERTS, dense.config.hidden_size, generator=rng),
            "selector.bias": torch.zeros(EXPERTS),
        }
        for _ in partitions
    ]
    routing = routing_of("layerwise", partitions, CHOSEN, Route(kind="layerwise"))
    return ConvertedSource(dense.source, partitions, routing, selectors=selectors)


@torch.no_grad()
def errors(source: ConvertedSource, dense: StreamedModel, ids: Tensor) -> tuple[float, float]:
    """Held-out distance of layer 0's FFN to the dense one, and of the last residual stream."""
    held = ids[[n for n in range(len(ids)) if is_held_out(n)]]
    model = StreamedModel(source)
    hidden = stream = model.embed(held)
    first = None
    for i in range(dense.num_layers):
        layer, own = model.layer(i), dense.layer(i)
        x = layer.mlp_input(layer.attend(hidden, model.context(hidden)))
        if first is None:
            first = (own.mlp(x) - layer.mlp(x)).double().square().sum(-1).mean().item()
        hidden = layer(hidden, None, model.context(hidden))
        stream = own(stream, None, dense.context(stream))
    assert first is not None
    return first, (hidden - stream).double().square().sum(-1).mean().item()


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("target", ["layer", "stream"])
def test_what_is_reported_is_what_the_refitted_model_does(
    dense: StreamedModel, ids: Tensor, target: Target, overlapping: bool
) -> None:
    source = routed(dense, overlapping)
    found = refit_layers(StreamedModel(source), dense, ids, batch_tokens=256, target=target)
    before, stream_before = errors(source, dense, ids)
    after, stream_after = errors(source.refitted(found), dense, ids)
    # Layer 0 sees the same inputs in both models, where the two targets are one.
    assert found[0].error_before == pytest.approx(before, rel=1e-4)
    assert found[0].error_after == pytest.approx(after, rel=1e-4)
    assert after < before
    assert stream_after != stream_before
    if target == "stream":
        assert found[-1].error_after == pytest.approx(stream_after, rel=1e-3)


def test_each_scope_moves_what_it_says(dense: StreamedModel, ids: Tensor) -> None:
    source, fitted = routed(dense), []
    kinds: list[tuple[Scope, bool]] = [("shared", False), ("shared", True), ("all", True)]
    for scope, restore in kinds:
        found = refit_layers(
            StreamedModel(source), dense, ids, batch_tokens=1024, scope=scope, restore=restore
        )
        assert ("restore" in found[0].tensors) == restore
        assert ("experts.down_proj" in found[0].tensors) == (scope == "all")
        # On the windows it is fitted to, more freedom cannot fit worse.
        few = refit_layers(
            StreamedModel(source), dense, ids[:7], batch_tokens=256, scope=scope, restore=restore
        )
        fitted.append(few[0].error_after)
    assert fitted[2] < fitted[1] < fitted[0]


def test_finished_layers_are_loaded_and_the_rest_is_the_same(
    dense: StreamedModel, ids: Tensor, tmp_path: Path
) -> None:
    source, store = routed(dense), UnitStore(tmp_path)

    def fit() -> list[RefitLayer]:
        return refit_layers(StreamedModel(source), dense, ids, batch_tokens=256, store=store)

    first = fit()
    (tmp_path / "layer_001.safetensors").unlink()
    for a, b in zip(first, fit(), strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
        assert (a.error_before, a.error_after, a.kind) == (b.error_before, b.error_after, b.kind)


def test_applied_and_written_refits_are_the_same_model(dense: StreamedModel, ids: Tensor) -> None:
    source = routed(dense)
    found = refit_layers(StreamedModel(source), dense, ids, batch_tokens=1024)
    applied, written = (
        StreamedModel(source).layer(0),
        StreamedModel(source.refitted(found)).layer(0),
    )
    apply_refit(applied, found[0])
    x = torch.randn(5, dense.config.hidden_size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(applied.mlp(x), written.mlp(x))
        assert not torch.allclose(applied.mlp(x), StreamedModel(source).layer(0).mlp(x))
