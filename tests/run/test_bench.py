"""The benchmarks: their settings, their conditions, and that the work they time is real."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fissile.run import bench_solver
from fissile.run.bench import BENCHES, list_benches

Cli = Callable[..., tuple[int, str, str]]
SMALL = ("tokens=3000", "width=96", "neurons=320", "shared=64", "experts=4", "top_k=1")


def settings(*more: str) -> list[str]:
    return [part for item in (*SMALL, "batch_tokens=512", *more) for part in ("--set", item)]


def test_a_small_layer(run_cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "row.json"
    code, text, _ = run_cli("bench", "layer", "-q", "--json", "--out", out, *settings())
    assert code == 0
    row = json.loads(text)
    assert json.loads(out.read_text()) == row
    steps = {"statistics", "partition", "factors", "norms and moments", "router"}
    assert {*row["by_step"]} == steps
    assert row["seconds"] == pytest.approx(sum(row["by_step"].values()))
    conditions = row["conditions"]
    assert (conditions["tokens"], conditions["width"], conditions["ridge"]) == (3000, 96, 0.01)
    assert {"load_average", "threads", "versions", "counted"} <= {*conditions}
    # What was timed found the planted structure: else it timed something else.
    quality = row["quality"]
    assert quality["shared_found"] == 1.0
    assert quality["purity"] > 0.9
    assert quality["recall_at_k"] > 2 * quality["chance"]


def test_the_solver_against_the_reference(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    held = 4 * (48 * 128 + 128 * 128)
    monkeypatch.setattr(bench_solver, "growth", lambda *_: 2 * held)
    sizes = ["outputs=48", "inputs=128", "tokens=512", "efforts=[fast, balanced]"]
    sizes.append("joint=[fast]")
    flags = [part for item in sizes for part in ("--set", item)]
    code, text, err = run_cli("bench", "solver", "-q", "--json", *flags)
    assert code == 0, err
    row = json.loads(text)
    reference, ours = row["reference"], row["ours"]
    assert reference["seconds"] == pytest.approx(sum(reference["by_step"].values()), rel=0.5)
    assert ours["balanced"]["loss"] < ours["fast"]["loss"] < 1.1 * reference["loss"]
    for found in ours.values():
        assert found["loss"] < found["held_out"]
        assert found["held_out_ratio"] == found["held_out"] / reference["held_out"]
    assert {*row["joint"]} == {"fast"}
    joint = row["joint"]["fast"]
    assert joint["time_ratio"] == joint["seconds"] / joint["alone_seconds"]
    for found in (*ours.values(), joint):
        assert found["memory_ratio"] == 3  # weight and Hessian themselves are counted
    assert {"load_average", "threads", "versions", "counted"} <= {*row["conditions"]}
    code, text, err = run_cli("bench", "solver", "-q", "--json", *flags, "--set", "reference=false")
    assert code == 0, err
    alone = json.loads(text)
    assert alone["reference"] == {}
    assert alone["ours"]["fast"]["loss"] == ours["fast"]["loss"]
    assert not any(name.endswith("loss_ratio") for name in alone["ours"]["fast"])
    code, _, err = run_cli("bench", "solver", "--set", "inputs=100")
    assert code == 2
    assert "inputs 100: not groups of 64" in err


def test_processes_that_share_a_layer(run_cli: Cli) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    sizes = ["width=64", "neurons=128", "tokens=512", "context=64", "effort=fast"]
    flags = [part for item in sizes for part in ("--set", item)]
    code, text, err = run_cli("bench", "ranks", "-q", "--json", *flags)
    assert code == 0, err
    row = json.loads(text)
    one, shared = row["one"], row["shared"]
    assert row["speedup"] == one["seconds"] / shared["seconds"]
    assert row["processor_ratio"] == one["processor_seconds"] / shared["processor_seconds"]
    # Both did the same work; the losses themselves are far from each other's rounding.
    assert 0 <= row["loss_difference"] < 0.01
    assert row["conditions"]["processes"] == 2
    code, _, err = run_cli("bench", "ranks", "--set", "processes=4096")
    assert code == 2
    assert "4096 processes need as many cores" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layr"], "unknown bench 'layr'; did you mean 'layer'?"),
        (["layer", "--set", "token=4"], "--set: token: unknown key; did you mean 'tokens'"),
        (["layer", "--set", "tokens=0"], "--set: tokens: Input should be greater than 0"),
        (["layer", "--set", "experts=9"], "neurons 11008 less shared 1376 are not 9 equal experts"),
        (["layer", "--set", "top_k=15"], "top_k 15 is more than the 14 experts"),
        (["layer", "--out", "no/such/row.json"], "its folder does not exist"),
        (["--set", "tokens=4"], "--set and --out need the NAME of a benchmark"),
    ],
)
def test_refusals_are_one_line(run_cli: Cli, words: list[str], message: str) -> None:
    code, out, err = run_cli("bench", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_the_list_names_every_setting(run_cli: Cli) -> None:
    code, text, _ = run_cli("bench")
    assert code == 0
    assert [row["name"] for row in list_benches()] == list(BENCHES)
    for row in list_benches():
        assert row["name"] in text
        assert all(key in text for key in row["settings"])
