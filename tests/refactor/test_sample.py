"""Refinement of a real model's experts, on the tiny random checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.refactor import sample
from fissile.refactor.calibrate import Windows
from fissile.refactor.partition import random_partition
from fissile.refactor.sample import RouterSees, ffn_inputs, pick_windows, refine_experts


@pytest.fixture
def windows() -> Windows:
    ids = torch.randint(3, 8192, (9, 16), generator=torch.Generator().manual_seed(0))
    return Windows(ids, torch.arange(9) % 2, ("a", "b"))


@pytest.fixture
def model(tiny_model: Path) -> StreamedModel:
    return StreamedModel(CheckpointSource(tiny_model))


def test_picked_windows_are_spread(windows: Windows) -> None:
    picked = pick_windows(windows, 16 * 3)
    assert torch.equal(picked.ids_NS, windows.ids_NS[[0, 3, 6]])
    assert torch.equal(picked.domain_N, windows.domain_N[[0, 3, 6]])
    assert len(pick_windows(windows, 1).ids_NS) == 1
    assert len(pick_windows(windows, 10**6).ids_NS) == 9


def test_inputs_are_what_the_stock_model_feeds_its_ffn(
    tiny_model: Path, model: StreamedModel, windows: Windows
) -> None:
    stock = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    for layer in stock.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        stock(windows.ids_NS)
    found = ffn_inputs(model, windows, batch_tokens=40)
    assert len(found) == len(seen) == 2
    for x_TD, expected in zip(found, seen, strict=True):
        torch.testing.assert_close(x_TD, expected.bfloat16(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("router", ["pregate", "pregate_per_layer", "layerwise", "oracle"])
def test_refined_experts(model: StreamedModel, windows: Windows, router: RouterSees) -> None:
    starts = [random_partition(torch.rand(256), shared_size=64, num_experts=6, seed=0)] * 2
    ticks: list[tuple[int, int]] = []
    refined = refine_experts(
        model,
        windows,
        starts,
        top_k=2,
        router=router,
        tokens=144,
        rounds=3,
        ridge=1e-2,
        batch_tokens=64,
        progress=lambda stage, done, total, detail: ticks.append((done, total)),
    )
    assert max(refined.captured) > refined.captured[0] + 0.02
    for partition in refined.partitions:
        assert (partition.shared_size, partition.expert_size) == (64, 32)
    assert all(done < total for done, total in ticks)


def test_what_each_router_sees(
    model: StreamedModel, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, tuple[bool, list[torch.Tensor] | None]] = {}
    for router in ("pregate", "pregate_per_layer", "layerwise", "oracle"):

        def spy(*args: Any, name: str = router, **settings: Any) -> None:
            see = settings["predict_from"]
            found[name] = settings["common"], None if see is None else [see(0), see(1)]

        monkeypatch.setattr(sample, "refine_partitions", spy)
        refine_experts(
            model,
            windows,
            [],
            top_k=1,
            router=router,
            tokens=144,
            rounds=1,
            ridge=1.0,
            batch_tokens=64,
        )
    inputs = ffn_inputs(model, windows, batch_tokens=64)
    expected = {
        "pregate": (True, (0, 0)),
        "pregate_per_layer": (False, (0, 0)),
        "layerwise": (False, (0, 1)),
        "oracle": (False, None),
    }
    for name, (common, layers) in expected.items():
        assert found[name][0] == common
        seen = found[name][1]
        assert (seen is None) == (layers is None)
        for x_TD, i in zip(seen or (), layers or (), strict=True):
            assert torch.equal(x_TD, inputs[i])
