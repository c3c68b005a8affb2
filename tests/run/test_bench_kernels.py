"""The benchmarks of kernels and decoding: they run to the end without a GPU and never pretend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.errors import UsageError
from fissile.kernels import configs
from fissile.kernels.defaults import Kind, default_config
from fissile.models import load
from fissile.models.nested_fissile import NestedTensor
from fissile.run import bench_decode, bench_kernels, kernel_cases, kernel_timing, kernel_tune
from fissile.run.kernel_cases import LLAMA_3_8B, Built, Case
from fissile.run.kernel_table import BEGIN, END, read_rows, readme_table, write_readme

Cli = Callable[..., tuple[int, str, str]]


def test_a_dry_run_ends_with_rows_a_plot_and_no_numbers(run_cli: Cli, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    files = {"csv": tmp_path / "rows.csv", "plot": tmp_path / "plot.svg", "readme": readme}
    words = [part for key, value in files.items() for part in ("--set", f"{key}={value}")]
    words += ["--set", "device=dry", "--set", "tokens=[1,3]", "--set", "bits=[4,8]"]
    code, out, _ = run_cli("bench", "kernels", "-q", "--json", *words)
    assert code == 0
    result = json.loads(out)
    rows = [row for row in result["rows"] if "error" in row]
    assert {row["shape"] for row in rows} == {shape.name for shape in LLAMA_3_8B}
    assert {row["implementation"] for row in rows} == {"fissile", "bf16", "grouped_mm"}
    assert {row["bits"] for row in rows} == {4, 8, 16}
    assert all(row["dry"] and 0 < row["error"] < 1e-2 for row in rows)
    measured = {"us", "least_us", "TBps", "TFs", "launches", "over_floor", "share_of_TBps"}
    assert not any(measured & {*row} for row in (*result["rows"], *result["steps"]))
    assert {row["how"] for row in rows if row["implementation"] == "fissile"} == {
        "float32 reference"
    }
    notes = {row["note"] for row in result["rows"] if row["implementation"] == "gemlite"}
    assert notes == {"gemlite needs a GPU", "gemlite has no such product"}
    stored = read_rows(files["csv"])
    every = [*result["rows"], *result["steps"]]
    assert [row["shape"] for row in stored] == [row["shape"] for row in every]
    steps = [row for row in stored if row["kind"] == "step"]
    assert [(row["bits"], row["layers"]) for row in steps] == [(4, 2), (8, 2)] * 2
    assert {"device", "triton", "seed", "versions", "code", "threads"} <= {*stored[0]}
    assert files["plot"].stat().st_size > 1000
    text = readme.read_text()
    assert text == f"before\n{BEGIN}\n{result['table']}{END}\nafter\n"
    cells = [line.split("|")[5:-1] for line in result["table"].splitlines()[2:]]
    assert {cell.strip() for row in cells for cell in row} == {"not measured"}


def test_the_table_shows_what_a_gpu_measured() -> None:
    row = {"device": "GPU A", "shape": "gate_up", "tokens": 1, "bits": 4, "dry": False}
    found = {**row, "implementation": "fissile", "us": 31.26, "share_of_TBps": 0.784}
    table = readme_table([found | {"vs_bf16": 3.014}, {**found, "dry": True, "us": 1.0}])
    lines = [line for line in table.splitlines() if "31.3" in line]
    assert lines == ["| GPU A | gate_up | 1 | 4 | 31.3 | 78% | 3.01 | not measured |"]
    assert "GPU A | gate_up | 16 | 2 | not measured |" in table
    later = readme_table([found, {**found, "us": 25.0}])
    assert "25.0" in later
    assert "31.3" not in later


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("text\n")
    with pytest.raises(Exception, match="no lines"):
        write_readme(path, "table\n")
    assert path.read_text() == "text\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["shapes=[gate]"], "shapes 'gate' (known: gate_up"),
        (["against=[marlin]"], "against 'marlin' (known: fissile"),
        (["csv=no/such/rows.csv"], "its folder does not exist"),
        (["tune=."], "tune needs a GPU"),
        (["device=cuda"], "torch sees no GPU"),
    ],
)
def test_refusals_are_one_line(
    run_cli: Cli, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = [part for word in words for part in ("--set", word)]
    code, out, err = run_cli("bench", "kernels", *settings)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_wrong_results_are_not_timed(run_cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def wrong(case: Case) -> Built:
        built = kernel_cases.build_fissile(case)
        asked.append(case.sets)
        return Built([lambda: built.calls[0]() * 1.05], built.truth, built.read_bytes)

    monkeypatch.setitem(kernel_cases.IMPLEMENTATIONS, "fissile", wrong)
    words = ("device=dry", "shapes=[k or v]", "tokens=[1]", "bits=[4]")
    settings = [part for word in words for part in ("--set", word)]
    code, _, err = run_cli("bench", "kernels", "-q", *settings)
    assert code == 5
    assert "fissile k or v M=1 4 bits: error 0.05" in err
    assert asked == [1]


def test_all_results_are_compared_before_the_first_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[tuple[str, str]] = []

    def checked(case: Case, name: str) -> dict[str, Any]:
        events.append(("check", name))
        row = {"shape": case.shape.name, "tokens": case.tokens, "bits": case.bits}
        return {**row, "implementation": name, "dry": False, "error": 0.0, "experts": 1}

    def timed(_: object, row: dict[str, Any]) -> dict[str, Any]:
        events.append(("time", row["implementation"]))
        return {"us": 2.0, "TBps": 1.0, "TFs": 1.0}

    limits = {"copy_TBps": 2.0, "read_TBps": 2.0, "bf16_TFs": 4.0, "empty_kernel_us": 1.0}
    for name, value in (
        ("_device", lambda _: "cuda"),
        ("_chosen", lambda *_: (list(LLAMA_3_8B[:2]), ["fissile", "bf16"])),
        ("_checked", checked),
        ("_timed", timed),
        ("_steps", lambda *_: []),
        ("ceilings", lambda *_: limits),
        ("_conditions", lambda *_: {"device": "GPU A"}),
    ):
        monkeypatch.setattr(bench_kernels, name, value)
    settings = bench_kernels.KernelsBench(tokens=(1,), bits=(4,))
    rows = bench_kernels.run(settings, lambda *_: None)["rows"]
    assert [kind for kind, _ in events] == ["check"] * 4 + ["time"] * 4
    assert all(row["share_of_TBps"] == 0.5 and row["vs_bf16"] == 1.0 for row in rows)


def test_sets_cover_the_cache_by_what_a_call_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_timing, "cache_bytes", lambda: 50 << 20)
    one_of_eight = kernel_timing.sets_needed(1 << 20, 8 << 20, "cuda", 24 << 30)
    assert one_of_eight * (1 << 20) >= 4 * (50 << 20)
    assert kernel_timing.sets_needed(1 << 20, 8 << 20, "cuda", 80 << 20) == 10
    experts = LLAMA_3_8B[-1].smaller(32)
    case = Case(experts, 1, 4, 128, "cpu", 1, 0)
    assert case.chosen() == experts.top_k
    assert case.weights_read() * experts.experts == experts.held() * experts.top_k
    three = Case(LLAMA_3_8B[0], 1, 3, 128, "cpu", 1, 0)
    padded = three.weight((128, 1792), 0)
    bits = kernel_cases.tiled_bytes(three, [padded]) * 8 / (128 * 1792)
    assert bits == pytest.approx((3 + 32 / 128) * 2048 / 1792)


def test_tuning_tries_the_default_and_names_what_does_not_fit() -> None:
    pytest.importorskip("triton")
    from triton.runtime.errors import OutOfResources

    jobs: list[tuple[Kind, int]] = [("decode", 1), ("decode", 16), ("prefill", 128)]
    for kind, rows in jobs:
        for bits in (2, 3, 4, 8):
            tried = kernel_tune.candidates(kind, rows, bits, 64)
            assert tried[0] == default_config(kind, bits, rows, 64)
            assert len(tried) <= 7
    few = kernel_tune.candidates("decode", 1, 4, 64)
    calls: list[int] = []

    def measured(_: object) -> float:
        calls.append(0)
        if len(calls) == 1:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return 1.0 / len(calls)

    best, without = kernel_tune.fastest("decode", few, measured)
    assert best == few[-1]
    assert [config for config, _ in without] == [few[0]]
    assert "shared memory" in without[0][1]

    def never(_: object) -> float:
        raise OutOfResources(300_000, 232_448, "shared memory")

    with pytest.raises(UsageError, match="no configuration fits"):
        kernel_tune.fastest("decode", few, never)


def test_tables_are_parsed_as_they_are_shipped() -> None:
    for path in configs.FOLDER.glob("*.json"):
        table = configs.parse_table(path.stem, json.loads(path.read_text()))
        assert 0 < table.decode_rows < table.scratch_rows
        assert (table.measured is None) == (path.stem == "default")
    assert configs.load_table("GPU of no table", "3.6.0").name == "default"


def test_torchs_operator_gets_the_same_weight(finished_run: Path) -> None:
    model: Any = load(finished_run, bits=4)
    linear = model.model.layers[0].self_attn.q_proj
    linear.weight.companding = 1.0  # codes are taken for values here, whatever they were made for
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    weight = linear.weight.dense(torch.float64)
    want = x.double() @ weight.T
    for dtype, most in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        got = bench_decode.TorchInt4(linear.weight, dtype)(x)
        assert got.dtype == x.dtype
        assert float((got.double() - want).norm() / want.norm()) < most


@pytest.mark.parametrize(("companding", "most"), [(1.0, 1e-4), (2.0, 0.2)])
def test_torchs_operator_takes_stacks_of_experts(
    finished_run: Path, companding: float, most: float
) -> None:
    models: list[Any] = [load(finished_run, bits=4) for _ in range(2)]
    for model in models:
        for module in model.modules():
            if isinstance(module, NestedTensor):
                module.companding = companding
    assert bench_decode.int4_model(models[1], torch.float32)
    assert not any(isinstance(module, NestedTensor) for module in models[1].modules())
    ids = torch.tensor([[5, 17, 230, 8, 99]])
    with torch.inference_mode():
        want, got = (model(input_ids=ids).logits.double() for model in models)
    error = float((got - want).norm() / want.norm())
    assert 0 < error < most


def test_decoding_is_compared_with_the_dense_model(
    run_cli: Cli, tiny_model: Path, finished_run: Path
) -> None:
    words = ("repeats=2", "steps=2", "prompt=4", "warmup=1", "widths=[4,2]")
    settings = [part for word in words for part in ("--set", word)]
    command = ("bench", "decode", tiny_model, finished_run, "-q", "--json")
    code, out, err = run_cli(*command, *settings)
    assert code == 0, err
    rows: dict[str, Any] = {row["implementation"]: row for row in json.loads(out)["rows"]}
    int4 = ["torch int4 bfloat16", "torch int4 float32"]
    assert [*rows] == ["dense float32", "fissile 4 bits", *int4, "fissile 2 bits"]
    assert rows["dense float32"]["logit_error"] is None
    for name in ("fissile 4 bits", "fissile 2 bits"):
        assert 0 < rows[name]["logit_error"] < 1e-5
        assert [path.split(":")[0] for path in rows[name]["paths"]] == ["columns"]
    assert rows["fissile 2 bits"]["nested_bytes"] < rows["fissile 4 bits"]["nested_bytes"]


def test_decode_needs_two_models(run_cli: Cli, tiny_model: Path) -> None:
    code, _, err = run_cli("bench", "decode", tiny_model)
    assert code == 2
    assert "fissile bench decode DENSE_DIR ARTIFACT_DIR" in err
