"""The comparison of speed: which run counts, what is compared, what a process measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fissile.eval.documents import rows_to_bytes
from fissile.eval.mmlu_bench import Job, compare_items, compare_speed, measure_job


@pytest.fixture
def data(tmp_path: Path) -> Path:
    row = {"question": "1 + 1?", "choices": list("1234"), "answer": 1, "subject": "anatomy"}
    path = tmp_path / "test.jsonl"
    path.write_bytes(rows_to_bytes([row, {**row, "question": "2 + 0?"}]))
    return path


def test_items_are_compared_by_choice_and_value() -> None:
    theirs = {"a": [-1.0, -2.0], "b": [-3.0, -2.0]}
    found = compare_items({"b": [-3.0, -2.5], "a": [-2.2, -2.0]}, theirs)
    assert found["same_choices"] == 0.5
    assert found["largest_relative_difference"] == pytest.approx(1.2)
    assert compare_items(theirs, theirs) == {"same_choices": 1, "largest_relative_difference": 0}


def test_a_process_measures_one_side(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    job = Job("fissile", tiny_model, data, shots=0, limit=1, batch=64, threads=1)
    measure_job(job, tmp_path / "tasks", out)
    found = json.loads(out.read_text())
    assert list(found["items"]) == ["anatomy/1"]
    assert found["seconds"] > 0
    assert found["peak_bytes"] is None or found["peak_bytes"] >= 0


def test_the_harness_s_best_batch_and_the_fastest_runs_count(
    tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")
    jobs: list[Job] = []
    seconds = iter([5.0, 3.0, 4.0, 2.0, 9.0, 1.5, 12.0])

    def measured(job: Job) -> dict[str, Any]:
        jobs.append(job)
        spent = next(seconds)
        numbers = {"seconds": spent, "cpu_seconds": spent / 2, "peak_bytes": 1, "batch": job.batch}
        return {**numbers, "items": {"anatomy/1": [-1.0, -2.0]}, "n_truncated": 1}

    monkeypatch.setattr("fissile.eval.mmlu_bench._in_process", measured)
    seen: list[tuple[Any, ...]] = []
    row = compare_speed(
        tiny_model, data, shots=0, limit=None, batch_tokens=99, batch_sizes=[1, 4, 16], repeats=2,
        progress=lambda *call: seen.append(call),
    )  # fmt: skip
    assert [(job.side, job.batch) for job in jobs] == [
        ("lm_eval", 1), ("lm_eval", 4), ("lm_eval", 16),
        ("fissile", 99), ("lm_eval", 4), ("fissile", 99), ("lm_eval", 4),
    ]  # fmt: skip
    assert (row["fissile"]["seconds"], row["lm_eval"]["seconds"]) == (1.5, 9.0)
    assert (row["speedup"], row["share_truncated"]) == (6.0, 1.0)
    assert seen[-1][1:3] == (7, 7)
