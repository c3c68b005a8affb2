"""Every router, rival and rule of choice that a recipe can ask for ends in a model that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from fissile import models
from fissile.config import Control, Recipe
from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.refactor.calibrate import Windows, gather_statistics
from fissile.run.extraction import Calibrated, layer_sizes
from fissile.run.systems import as_control, expert_unit, router_unit

Cli = Callable[..., tuple[int, str, str]]
FLOAT = ["quantize.enabled=false", "recover.method=none", "extract.refine_tokens=512"]


@pytest.fixture
def convert(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Cli
) -> Callable[..., tuple[Any, dict[str, Any]]]:
    def call(*items: str) -> tuple[Any, dict[str, Any]]:
        sets = [part for item in (*FLOAT, *items) for part in ("--set", item)]
        base = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", tmp_path / "out"]
        code, _, err = run_cli("run", *base, *small_recipe, *sets, "--stop-after", "verify")
        assert code == 0, err
        config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
        return models.load(tmp_path / "out"), config["routing"]

    return call


def chosen(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """How many experts of layer 1 each token computes."""
    seen: list[torch.Tensor] = []
    experts = model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(
        lambda _module, args: seen.append((args[2] != 0).sum(1))
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    return torch.cat(seen)


def test_balance_and_a_varying_number_of_experts(
    convert: Callable[..., tuple[Any, dict[str, Any]]],
) -> None:
    model, routing = convert(
        "route.kind=layerwise", "route.dynamic_k=true", "route.balance_load=true", "route.max_k=3"
    )
    assert len(routing["threshold"]) == 2
    assert routing["selection_bias"] is True
    assert bool(model.model.layers[1].mlp.selector.balance.any())
    ids = torch.randint(3, 8192, (4, 64), generator=torch.Generator().manual_seed(0))
    count = chosen(model, ids)
    assert count.max() <= 3
    assert len(count.unique()) > 1


def test_a_pregate_with_thresholds_and_balance(
    convert: Callable[..., tuple[Any, dict[str, Any]]],
) -> None:
    model, routing = convert("route.dynamic_k=true", "route.balance_load=true")
    assert len(routing["threshold"]) == 2
    assert tuple(model.model.router.balance.shape) == (1, 4)


@pytest.mark.parametrize(
    "items",
    [
        ("route.kind=layerwise", "route.selector=spectral", "route.selector_rank=4"),
        ("route.kind=layerwise", "route.on_trajectory=true"),
        ("route.block=token", "route.on_trajectory=true"),
        ("extract.method=cmoe", "route.kind=layerwise"),
        ("extract.method=expertweaver", "route.kind=layerwise"),
        ("extract.method=emoe", "route.kind=layerwise", "recover.refit_scope=all"),
        ("extract.method=readme", "route.block=readme", "route.width=32", "extract.top_k=1"),
    ],
    ids=lambda items: "-".join(item.split("=")[1] for item in items),
)
def test_a_kind_of_conversion(
    convert: Callable[..., tuple[Any, dict[str, Any]]], items: tuple[str, ...]
) -> None:
    model, routing = convert(*items)
    settings = dict(item.split("=") for item in items)
    method, block = settings.get("extract.method"), settings.get("route.block")
    kind = {"cmoe": "glu"}.get(method or "", settings.get("route.selector", "linear"))
    assert routing.get("selector", "linear") == kind
    assert routing["layout"] == ("membership" if method == "readme" else "disjoint")
    assert (model.model.router is not None) == (block is not None)
    if block is not None:
        assert routing["router"]["block"] == block
    if method in ("expertweaver", "emoe"):
        assert routing["top_k"] == routing["num_experts"] // 2


@pytest.mark.parametrize("allocation", ["proxy", "kl"])
def test_layers_share_one_budget(tiny_model: Path, tmp_path: Path, allocation: str) -> None:
    dense = StreamedModel(CheckpointSource(tiny_model))
    ids = torch.randint(3, 8192, (16, 32), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, torch.zeros(16, dtype=torch.int64), ("a",))
    store = UnitStore(tmp_path)
    stats = gather_statistics(
        dense, windows, batch_tokens=256, sketch_dim=16, seed=0, store=store.under("stats")
    )
    assert sum(1 for _ in stats) == 2
    given = Calibrated(dense, windows, store.under("stats"), lambda *_: None)
    extract = {"num_experts": 4, "top_k": 2, "multiple": 4, "active_share": 0.5}
    even, spread = (
        layer_sizes(given, Recipe(extract=extract | {"allocation": kind}), store.under(kind))
        for kind in ("uniform", allocation)
    )
    assert sum(s.active_share for s in spread) == pytest.approx(sum(s.active_share for s in even))
    width = dense.config.intermediate_size
    assert all(s.shared + s.num_experts * s.expert == width for s in spread)
    assert all(s.shared >= 0 and s.expert >= 4 for s in spread)


def test_controls_share_what_is_equal_and_nothing_else() -> None:
    main = Recipe()
    units = {}
    for name in get_args(Control):
        for share in (main.extract.active_share, 0.5):
            recipe = as_control(main, name, share)
            units[name, share] = expert_unit(recipe, main), router_unit(recipe, main)
    own = units["pregate", 0.75]
    assert own == ("extract", "route")
    # The oracle and random choices are made among the recipe's own experts.
    assert units["oracle", 0.75] == units["random", 0.75] == own
    # Routers inside the layers have experts of their own, which all of their kinds share.
    assert units["ridge", 0.75][0] == units["spectral", 0.75][0] == units["mean_gate", 0.75][0]
    assert len({units[name, 0.75][1] for name in ("ridge", "spectral", "mean_gate")}) == 3
    assert units["oracle_layerwise", 0.75] == units["ridge", 0.75]
    assert units["oracle_per_layer", 0.75] == units["per_layer", 0.75]
    experts = {units[name, 0.75][0] for name in ("pregate", "per_layer", "ridge", "cmoe", "emoe")}
    assert len(experts) == 5
    assert not {unit for (_, share), unit in units.items() if share == 0.5} & {
        unit for (_, share), unit in units.items() if share == 0.75
    }
