"""The report's evaluations: answers of a run, and result files beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fissile.run.metrics import Score, read_metrics
from fissile.run.report import write_report
from fissile.run.report_eval import answer_table, stored_results


def stored(kind: str, task: str, shift: float, *, bits: int | None = None) -> dict[str, Any]:
    """A result file of a dense ("llama") or converted ("fissile") model."""
    if task == "perplexity":
        items: list[dict[str, Any]] = [
            {"id": str(i), "domain": "a", "nll": 30.0 + i + shift * (1 + i % 3), "tokens": 10}
            for i in range(20)
        ]
        score = {"n_tokens": 200, "ppl": 50.25, "stderr": 1.5, "by_domain": {"a": 50.25}}
    else:
        items = [
            {"id": str(i), "subject": "a", "correct": float(i % 10 < shift), "answer": 0}
            for i in range(60)
        ]
        score = {"n_items": 60, "accuracy": shift / 10, "stderr": 0.06, "by_subject": {}}
    conditions = {"data": {"sha256": "d"}, "model": {"type": kind, "sha256": kind}, "context": 64}
    return {
        "schema_version": 1, "task": task, "bits": bits, **score,
        "conditions": conditions, "items": items,
    }  # fmt: skip


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run's files that a report reads, with results beside them."""
    folder = tmp_path / "run"
    (folder / "eval").mkdir(parents=True)
    for name in ("metrics.json", "ledger.csv", "recipe.yaml", "plan.json"):
        shutil.copyfile(finished_run / name, folder / name)
    files = {
        "dense-ppl": stored("llama", "perplexity", 0.0),
        "float-ppl": stored("fissile", "perplexity", 0.5),
        "bits3-ppl": stored("fissile", "perplexity", 0.9, bits=3),
        "dense-choices": stored("llama", "choices", 6),
        "bits3-choices": stored("fissile", "choices", 6, bits=3),
    }
    for name, result in files.items():
        (folder / "eval" / f"{name}.json").write_text(json.dumps(result))
    return folder


def test_results_are_compared_with_the_dense_models(run: Path) -> None:
    found = {one.file: one for one in stored_results(run)}
    against = found["bits3-ppl.json"].against
    assert against is not None
    assert against.total.difference.value == pytest.approx(
        sum(0.9 * (1 + i % 3) for i in range(20)) / 200
    )
    assert against.total.verdict == "A is better"
    choices = found["bits3-choices.json"].against
    assert choices is not None
    assert choices.total.verdict == "no difference seen"
    assert found["dense-ppl.json"].against is None
    # Other data: listed, but compared with nothing.
    other = stored("fissile", "perplexity", 0.9, bits=2)
    other["conditions"]["data"]["sha256"] = "e"
    (run / "eval" / "x.json").write_text(json.dumps(other))
    assert {o.file: o.against for o in stored_results(run)}["x.json"] is None


def test_page_and_json_hold_them(run: Path) -> None:
    (run / "eval" / "broken.json").write_text("{")
    page, data = write_report(run)
    html, parsed = page.read_text(), json.loads(data.read_text())
    section = html[html.index("<h2>Evaluations</h2>") :]
    section = section[: section.index("</section>")]
    assert "dense is better" in section
    assert "no difference seen" in section
    assert "3 bits" in section
    assert "50.25" in section
    assert "broken.json was not read" in section
    results = {row["file"]: row for row in parsed["evaluations"]["results"]}
    assert len(results) == 6
    assert results["bits3-ppl.json"]["against_dense"]["total"]["metric"] == "ppl"
    assert not any("items" in row for row in results.values())
    assert "not JSON" in results["broken.json"]["problem"]


def test_a_run_answers_items_at_every_width(finished_run: Path) -> None:
    metrics = read_metrics(finished_run / "metrics.json")
    assert metrics.dense is not None
    assert metrics.dense.choices is not None
    assert len(metrics.dense.choices.credit) == 6
    own = [w for w in metrics.widths if w.of == "converted" and w.method in ("float", "nested")]
    assert {w.bits for w in own} == {None, 2, 3, 4}
    for width in own:
        assert width.choices is not None
        credit = width.choices.credit
        assert width.choices.accuracy == pytest.approx(sum(credit) / len(credit))
        assert width.choices.documents == metrics.dense.choices.documents
    assert all(w.choices is None for w in metrics.widths if w not in own)
    data = json.loads((finished_run / "report.json").read_text())["evaluations"]
    assert [row["model"] for row in data["choices"]] == [
        "dense", "the converted model in floats", "4 bits", "3 bits", "2 bits",
    ]  # fmt: skip
    shown = answer_table(metrics)
    assert shown is not None
    assert "6 items" in shown.markup


def test_without_answers_there_is_no_table(finished_run: Path) -> None:
    metrics = read_metrics(finished_run / "metrics.json")
    assert answer_table(metrics.model_copy(update={"dense": Score(ppl=1.0), "widths": []})) is None


def test_eval_writes_what_the_report_reads(
    run: Path, finished_run: Path, tiny_model: Path, text_file: Path, run_cli: Callable[..., Any]
) -> None:
    for folder, name in ((finished_run, "own"), (tiny_model, "theirs")):
        words = ["eval", folder, "--task", "perplexity", "--data", text_file, "--limit", "4"]
        assert run_cli(*words, "--out", run / "eval" / f"{name}.json")[0] == 0
    found = {one.file: one for one in stored_results(run)}
    against = found["own.json"].against
    assert against is not None
    assert against.total.clusters == 4
    assert against.total.a == pytest.approx(found["theirs.json"].result["ppl"])  # type: ignore[index]
    assert "model.sha256" in against.differs
