"""The table over seeds, from metrics made by hand; and one real run of the bench."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from fissile.config import Control
from fissile.run.bench_experts import gap_rows
from fissile.run.metrics import Metrics

Cli = Callable[..., tuple[int, str, str]]


def metrics(**gaps: tuple[float, float]) -> Metrics:
    """One run at share 0.5 without recovery: system to ln ppl - ln ppl(dense) of two domains."""
    base = {"a": 10.0, "b": 30.0}

    def score(values: tuple[float, float]) -> dict[str, Any]:
        pairs = zip(base.items(), values, strict=True)
        return {"ppl": 20.0, "by_domain": {k: v * math.exp(gap) for (k, v), gap in pairs}}

    variants = [{"name": n, "share": 0.5, "recovery": "none", **score(v)} for n, v in gaps.items()]
    return Metrics(
        name="t", created="", source="s", seed=0, dense=score((0.0, 0.0)), variants=variants
    )


def test_rows_are_means_over_domains_then_seeds() -> None:
    rows = gap_rows(
        [
            metrics(static=(0.2, 0.4), pregate=(0.1, 0.3), oracle=(0.1, 0.1)),
            metrics(static=(0.4, 0.6), pregate=(0.2, 0.2), oracle=(0.0, 0.2)),
        ]
    )
    found = {row["system"]: row for row in rows}
    assert found["static"]["gap"] == pytest.approx(0.4)
    assert found["static"]["gap_by_seed"] == pytest.approx([0.3, 0.5])
    assert found["static"]["gap_sd"] == pytest.approx(math.sqrt(0.02))
    assert found["static"]["by_domain"] == pytest.approx({"a": 0.3, "b": 0.5})
    assert found["pregate"]["of_static"] == pytest.approx(0.5)
    # (0.4 - 0.2) of (0.4 - 0.1)
    assert found["pregate"]["closed"] == pytest.approx(2 / 3)
    assert "closed" not in found["oracle"]


def test_what_one_run_lacks_is_compared_within_the_others() -> None:
    rows = gap_rows(
        [
            metrics(static=(0.4, 0.4), pregate=(0.2, 0.2), oracle=(0.0, 0.0)),
            metrics(static=(0.8, 0.8), oracle=(0.1, 0.1)),
        ]
    )
    found = {row["system"]: row for row in rows}
    assert found["pregate"]["of_static"] == pytest.approx(0.5)
    assert found["pregate"]["closed"] == pytest.approx(0.5)
    assert found["oracle"]["of_static"] == pytest.approx(0.05 / 0.6)
    lacking = gap_rows([metrics(static=(0.4, 0.4)), metrics(oracle=(0.1, 0.1))])
    assert [row for row in lacking if "of_static" in row and row["system"] == "oracle"] == []


def test_an_oracle_that_is_no_better_leaves_nothing_to_close() -> None:
    rows = gap_rows([metrics(static=(0.2, 0.2), ridge=(0.1, 0.1), oracle_layerwise=(0.2, 0.2))])
    assert next(row for row in rows if row["system"] == "ridge")["closed"] is None


def test_two_seeds_of_a_tiny_model(
    tiny_model: Path, small_recipe: list[str], tmp_path: Path, run_cli: Cli
) -> None:
    items = [item for item in small_recipe if item != "--set"]
    items += ["quantize.enabled=false", "recover.method=none", "evaluate.choices=0"]
    given = ["recipe=demo/moe-nested", f"folder={tmp_path / 'runs'}", "seeds=[3,4]"]
    given.append(f"change={json.dumps(items)}")
    flags = [part for item in given for part in ("--set", item)]
    code, text, err = run_cli("bench", "experts", tiny_model, "-q", "--json", *flags)
    assert code == 0, err
    row = json.loads(text)
    assert row["seeds"] == [3, 4]
    assert len(row["dense"]) == 2
    systems = {(r["system"], r["recovery"]): r for r in row["rows"]}
    assert {("static", "none"), ("static", "refit"), ("oracle", "none")} <= systems.keys()
    assert all(len(r["gap_by_seed"]) == 2 for r in row["rows"])
    assert len({*systems["static", "none"]["gap_by_seed"]}) == 2
    assert run_cli("bench", "experts", "-q")[0] == 2


def test_every_system_has_a_name_a_look_and_a_place() -> None:
    from fissile.run.advice import LABELS
    from fissile.run.metrics_routing import Model
    from fissile.run.plots import _CONTROLS
    from fissile.run.theme import DARK, LIGHT, MARKERS

    named = {*get_args(Model)}
    assert {*get_args(Control)} <= named
    assert named <= LABELS.keys()
    drawn = named - {"dense"}
    assert drawn == {*_CONTROLS}
    assert drawn <= MARKERS.keys() & LIGHT.method.keys() & DARK.method.keys()
