"""Gates on recovered scores: what fails, what merely is in doubt, and where it is reported."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from fissile.config import Limits
from fissile.errors import QualityGate, RecipeError
from fissile.recipe_files import parse_recipe
from fissile.run.gates import GateRow, check_gates, enforce_gates, gate_events
from fissile.run.ledger import Ledger

TOKENS = [100 + 7 * i for i in range(40)]


def score(lost: float, share: float, **more: Any) -> dict[str, Any]:
    """A score whose perplexity is exp(lost) of the dense one, give or take, and its accuracy."""
    random = np.random.default_rng(5)
    noise = random.normal(0, 0.01, len(TOKENS))
    nll = [t * (3 + lost * (1 + n)) for t, n in zip(TOKENS, noise, strict=True)]
    credit = [float(i % 10 < 10 * share) for i in range(80)]
    answers = {
        "accuracy": sum(credit) / 80,
        "credit": credit,
        "documents": [str(i // 2) for i in range(80)],
    }
    return {
        "ppl": math.exp(sum(nll) / sum(TOKENS)),
        "document_nll": nll,
        "document_tokens": TOKENS,
        "choices": answers,
        **more,
    }


def record(**more: Any) -> dict[str, Any]:
    widths = [
        score(0.02, 0.7, method="float", bits=None),
        score(0.05, 0.6, method="nested", bits=4),
        score(0.5, 0.3, method="nested", bits=2),
        score(0.0, 0.7, method="rtn", bits=4),
        score(9.9, 0.1, method="nested", bits=3, of="dense"),
    ]
    return {"dense": score(0.0, 0.7), "widths": widths, **more}


def rows(**recovery: Any) -> dict[str, GateRow]:
    found = check_gates(Limits(recovery=recovery), record())
    return {f"{row.task}.{row.model}": row for row in found}


def test_a_bare_number_holds_for_every_served_width() -> None:
    found = rows(perplexity=0.9, choices=0.9)
    assert set(found) == {f"{t}.{m}" for t in ("perplexity", "choices") for m in ("float", 4, 2)}
    row = found["perplexity.4"]
    assert row.recovery == pytest.approx(math.exp(-0.05), rel=1e-3)
    assert row.recovery is not None
    assert row.low is not None
    assert row.high is not None
    assert row.low < row.recovery < row.high < row.recovery + 0.01
    assert [found[f"perplexity.{m}"].ok for m in ("float", 4, 2)] == [True, True, False]
    assert found["choices.2"].recovery == pytest.approx(3 / 7)
    assert [found[f"choices.{m}"].ok for m in ("float", 4, 2)] == [True, True, False]


def test_below_the_limit_within_the_interval_is_doubt_not_failure() -> None:
    row = rows(choices={"4": 0.9})["choices.4"]
    assert row.recovery == pytest.approx(6 / 7)
    assert row.recovery is not None
    assert row.high is not None
    assert row.high > 0.9 > row.recovery
    assert row.ok
    assert row.detail.endswith("limit 0.9: below it, but within the interval")
    sure = rows(choices={"4": 1.0})["choices.4"]
    assert not sure.ok
    assert sure.detail.endswith("limit 1: missed by 0.143")


def test_interval_of_the_accuracy_ratio_is_scipys() -> None:
    row = rows(choices={"4": 0.9})["choices.4"]
    ours, dense = (np.array(score(0, s)["choices"]["credit"]) for s in (0.6, 0.7))
    pairs = (ours.reshape(40, 2).sum(1), dense.reshape(40, 2).sum(1))

    def ratio(a: Any, b: Any, axis: int = -1) -> Any:
        return a.sum(axis) / b.sum(axis)

    theirs = stats.bootstrap(
        pairs, ratio, paired=True, method="percentile", n_resamples=4000, rng=1
    ).confidence_interval
    assert row.low == pytest.approx(theirs.low, abs=0.02)
    assert row.high == pytest.approx(theirs.high, abs=0.02)


def test_what_was_not_measured_is_a_missed_gate() -> None:
    row = rows(perplexity={"3": 0.1})["perplexity.3"]
    assert not row.ok
    assert row.detail == "was not measured, limit 0.1"
    lame = record()
    for width in lame["widths"]:
        width["choices"] = None
    [row] = check_gates(Limits(recovery={"choices": {"float": 0.1}}), lame)
    assert not row.ok


def test_the_error_names_every_gate_and_by_how_much() -> None:
    found = list(rows(perplexity=0.9, choices={"2": 0.9}).values())
    with pytest.raises(QualityGate) as caught:
        enforce_gates(found)
    message = str(caught.value)
    assert "perplexity of 2 bits: recovery 0.608" in message
    assert "limit 0.9: missed by 0.292" in message
    assert "choices of 2 bits: recovery 0.429" in message
    assert "4 bits" not in message
    assert [event.kind for event in gate_events(found)] == ["gate_missed", "gate_missed"]
    enforce_gates([row for row in found if row.ok])


def test_recipes_name_widths_as_numbers_or_text() -> None:
    data = {"limits": {"recovery": {"choices": {3: 0.9, "float": 0.97}, "perplexity": 0.8}}}
    recipe = parse_recipe(data)
    assert recipe.limits.recovery["choices"] == {"3": 0.9, "float": 0.97}
    again = parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe
    for wrong in ({"choices": {5: 0.9}}, {"choices": 1.1}, {"mmlu": 0.9}):
        with pytest.raises(RecipeError, match=r"limits\.recovery"):
            parse_recipe({"limits": {"recovery": wrong}})


def test_a_run_that_misses_its_gates(
    tiny_model: Path, small_recipe: list[str], tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    """Everything is written, then the run fails with code 5."""
    out = tmp_path / "run"
    off = ["quantize.enabled=false", "evaluate.controls=[]", "recover.method=none"]
    gate = "limits.recovery={perplexity: 0.2, choices: {4: 0.5}}"
    sets = [part for item in (*off, gate) for part in ("--set", item)]
    words = ["run", "demo/moe-nested", "-q", "--model", tiny_model, "--out", out, *small_recipe]
    code, _, err = run_cli(*words, *sets)
    assert code == 5
    assert err.splitlines()[-1] == (
        "fissile: error: limits.recovery missed: choices of 4 bits: was not measured, limit 0.5"
    )
    metrics = json.loads((out / "metrics.json").read_text())
    assert [(g["task"], g["model"], g["ok"]) for g in metrics["gates"]] == [
        ("perplexity", "float", True),
        ("choices", "4", False),
    ]
    assert len(metrics["dense"]["choices"]["credit"]) == 6
    [event] = [e for e in Ledger.from_csv(out / "ledger.csv").events if e.stage == "evaluate"]
    assert (event.kind, event.module) == ("gate_missed", "choices of 4 bits")
    assert "choices of 4 bits" in (out / "report.html").read_text()
    code, _, err = run_cli(*words, *sets, "--resume")
    assert (code, err.count("missed")) == (5, 1)
