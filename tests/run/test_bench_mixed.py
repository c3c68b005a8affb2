"""`fissile bench mixed` on a tiny model: loads of one code, what they hold, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource
from fissile.quant.layers import final_layer
from fissile.run.bench import run_bench
from fissile.run.nesting import decoded, loaded_bits

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def found(
    tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("mixed")
    items = [f"calibration={text_file}", f"held_out={text_file}", "tokens=1024", "context=64"]
    items += ["held_out_tokens=600", f"folder={folder}", "budgets=[2.6,3.2,4.0,9.0]"]
    items.append(f"models=[{tiny_model}]")
    return run_bench("mixed", items, lambda *_: None), folder


def test_rows_are_within_their_budgets_and_end_at_single_widths(
    found: tuple[dict[str, Any], Path],
) -> None:
    rows = found[0]["rows"]
    single, mixed = rows[:3], rows[3:]
    assert [row["budget"] for row in single] == [None] * 3
    sizes = [row["bits_per_weight"] for row in single]
    assert sizes == pytest.approx([sizes[0], sizes[0] + 1, sizes[0] + 2])
    assert [row["budget"] for row in mixed] == [2.6, 3.2, 4.0, 9.0]
    for row in mixed:
        assert sizes[0] <= row["bits_per_weight"] <= row["budget"]
    sized = [row["bits_per_weight"] for row in mixed]
    assert sized == sorted(set(sized))
    # A budget for everything is the widest width; one between has a place on the line.
    assert mixed[3]["gap"] == single[2]["gap"] == mixed[3]["line"]
    share = mixed[1]["bits_per_weight"] - sizes[0]
    below, above = single[0]["gap"], single[1]["gap"]
    assert 0 < share < 1
    assert mixed[1]["line"] == pytest.approx(below + share * (above - below))


def test_a_weight_is_what_its_own_width_decodes_to(
    found: tuple[dict[str, Any], Path], tiny_model: Path
) -> None:
    source, store = CheckpointSource(tiny_model), UnitStore(found[1] / "fast_0")
    layers = [final_layer(store, i) for i in range(source.config.num_base_layers)]
    names = [f"model.layers.{i}.{name}" for i, own in enumerate(layers) for name in own.groups]
    widths: dict[str, int | list[int]] = {n: 2 + i % 3 for i, n in enumerate(names)}
    state = decoded(source, iter(layers), widths)
    cost = count = 0.0
    for i, own in enumerate(layers):
        tensors = state.layer_state(i)
        for name in own.groups:
            bits = widths[f"model.layers.{i}.{name}"]
            nested = own.nested(name)
            assert isinstance(bits, int)
            assert (tensors[name] == nested.dequantize(bits)).all()
            floats = 2 * 16 * nested.scale[bits].numel()
            cost += bits * nested.codes.numel() + floats
            count += nested.codes.numel()
    assert loaded_bits(layers, widths) == pytest.approx(cost / count)


def test_refusals(run_cli: Cli, tiny_model: Path, text_file: Path) -> None:
    given = ["--set", f"calibration={text_file}", "--set", f"held_out={text_file}"]
    for words, message in (
        ([], "one dense model"),
        ([tiny_model, *given, "--set", "budgets=[]"], "name at least one"),
    ):
        code, _, err = run_cli("bench", "mixed", *words)
        assert code == 2
        assert message in err


def test_a_folder_of_other_results_is_not_taken_for_ones_own(
    found: tuple[dict[str, Any], Path], run_cli: Cli, tiny_model: Path, text_file: Path
) -> None:
    items = [f"calibration={text_file}", f"held_out={text_file}", f"folder={found[1]}"]
    given = [part for item in items for part in ("--set", item)]
    code, _, err = run_cli("bench", "mixed", tiny_model, "-q", *given, "--set", "tokens=2048")
    assert code == 2
    assert "holds results with another tokens" in err
