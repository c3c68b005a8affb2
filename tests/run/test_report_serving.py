"""The comparison of serving systems on its page, and in the report of a run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fissile.errors import CorruptCheckpoint
from fissile.run.metrics_serving import Serving, read_serving
from fissile.run.plots_serving import look, middle
from fissile.run.report import write_report
from fissile.run.report_serving import (
    serving_advice,
    serving_table,
    stored_comparisons,
    stored_parts,
    write_comparison,
)
from fissile.serve.batching import Limits
from fissile.serve.hardware import MACHINES
from fissile.serve.synthetic import synthetic_trace
from fissile.serve.systems import SYSTEMS, compare_systems, find_system
from fissile.serve.trace import ModelShape

MODEL = ModelShape("<toy>", 3, 6, 2, ((40_000, 20_000),), 1e6, 1e5, 1e6, 64.0)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    trace = synthetic_trace("local", MODEL, requests=12, prompt=(4, 40), output=(3, 12), rate=1e5)
    systems = [*SYSTEMS.values(), find_system("mine=layered,next-gate,lfu,gpu,layer")]
    machine = MACHINES["laptop-nvme"]
    return compare_systems(
        trace, systems, machine, shares=(0.4, 0.8), limits=Limits(16, 8, 8)
    ).to_dict()


def test_the_page_shows_every_number_of_the_comparison(
    found: dict[str, Any], tmp_path: Path
) -> None:
    written = write_comparison(found, tmp_path / "out")
    assert [path.name for path in written] == ["serving.json", "serving.html"]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(found))
    page = written[1].read_text()
    assert page.count("<img") == 3
    assert "&lt;toy&gt;" in page
    assert "<toy>" not in page
    for row in found["rows"]:
        assert f"<td>{row['name']}</td>" in page
        rate = row["outcome"]["tokens_per_second"]
        assert (f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}") in page
        assert f"{100 * row['outcome']['hit_rate']:.1f}" in page
    parts = ("mine", "layered", "next-gate", "lfu, by layer", "gpu")
    assert "".join(f"<td>{part}</td>" for part in parts) in page
    serving = read_serving(written[0])
    assert serving.names == [*SYSTEMS, "mine"]
    assert len(set(look(serving).values())) == 9
    assert middle(serving) == 0.4


def test_the_advice_follows_the_numbers(found: dict[str, Any]) -> None:
    serving = Serving.model_validate(found)
    rows = serving.at(0.4)
    real = [row for row in rows if row.cache != "oracle"]
    best = max(real, key=lambda row: row.outcome.tokens_per_second)
    texts = {topic: (level, text) for level, topic, text in serving_advice(serving)}
    assert best.name in texts["Fastest"][1]
    assert "Router" not in texts
    # The oracle is a bound: it is never advised, however fast.
    for row in found["rows"]:
        if row["name"] == "oracle":
            fast = {**row["outcome"], "tokens_per_second": 1e9}
    faked = [row if row["name"] != "oracle" else {**row, "outcome": fast} for row in found["rows"]]
    assert serving_advice(Serving.model_validate({**found, "rows": faked})) == serving_advice(
        serving
    )
    # A system that computes with fewer bits is not compared as if it were exact.
    faked = [
        row if row["name"] != "mixed" else {**row, "outcome": {**fast, "degraded_share": 0.25}}
        for row in found["rows"]
    ]
    lossy = serving_advice(Serving.model_validate({**found, "rows": faked}))
    texts = {topic: (level, text) for level, topic, text in lossy}
    assert texts["Fastest"][1].startswith("With 40 % of the experts in memory, mixed")
    assert "25 % of the choices at fewer bits" in texts["Exact"][1]
    assert best.name in texts["Exact"][1]
    # A model with routers inside its layers cannot be served by what decides before.
    layerwise = {**found, "trace": {**found["trace"], "source": {"decides": "layerwise"}}}
    texts = {t: (lv, x) for lv, t, x in serving_advice(Serving.model_validate(layerwise))}
    assert texts["Router"][0] == "warning"
    assert texts["Router"][1].startswith("This model decides inside its layers. prefetch, fissile")


def test_one_capacity_has_no_curve(found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if row["share"] == 0.8]
    serving = Serving.model_validate({**found, "rows": rows})
    assert serving_table(serving).markup.count("<tr>") == 10
    parts = [part for part in stored_parts([("a", serving)]) if part is not None]
    assert sum(part.markup.count("<img") for part in parts) == 2


def test_the_report_of_a_run_has_the_comparisons_in_its_folder(
    found: dict[str, Any], finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    assert "Not simulated" in (run / "report.html").read_text()
    write_comparison(found, run / "serving" / "second")
    (run / "serving" / "third").mkdir()
    (run / "serving" / "third" / "serving.json").write_text("{}")
    stored = dict(stored_comparisons(run))
    assert list(stored) == [
        "serving/second/serving.json",
        "serving/third/serving.json",
    ]
    page, data = write_report(run)
    assert page.read_text().count("Systems by the share of the experts") == 2
    assert "third/serving.json was not read" in page.read_text()
    report = json.loads(data.read_text())["serving"]
    row = report["serving/second/serving.json"]["rows"][0]
    assert row["outcome"]["hit_rate"] == found["rows"][0]["outcome"]["hit_rate"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ('{"rows": []}', "trace: Field required"),
    ],
)
def test_damaged_files_are_named(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    path.write_text(text)
    with pytest.raises(CorruptCheckpoint, match=problem):
        read_serving(path)


def test_what_is_compared_needs_a_name_and_a_size_that_fits() -> None:
    from fissile.errors import UsageError

    trace = synthetic_trace("uniform", replace(MODEL, planes=((4,),)), requests=2)
    machine = MACHINES["laptop-nvme"]
    one = SYSTEMS["on-demand"]
    for systems, shares in (
        ([], (0.5,)),
        ([one, one], (0.5,)),
        ([one], (0.0,)),
        ([one], (math.nan,)),
    ):
        with pytest.raises(UsageError):
            compare_systems(trace, systems, machine, shares=shares)
