"""What production kernels read and write, watched in Triton's interpreter; run by test_numerics.py.

Not collected by itself, see `interpreted.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.kernels.cases import BF16, FP16, WIDTHS, random_parts, routed, tokens
from torch import Tensor
from triton.runtime.errors import InterpreterError

from fissile.kernels import grids, launch, route, tiles
from fissile.kernels.launch import LaunchConfig
from fissile.kernels.proof import interpreter
from fissile.kernels.proof.interpreter import Guard


@pytest.fixture(autouse=True)
def _mended() -> None:
    interpreter.install()


def watched(bits: int, **changes: Tensor) -> tuple[Guard, dict[str, Tensor]]:
    """One product with all its tensors under guard; `changes` replaces some of them."""
    weight = tiles.tile(random_parts((1, 128, 1024), 128), bits)
    x = tokens(8, 1024, BF16)
    used = {
        "x": x,
        **weight.tensors(),
        "y": torch.zeros(2, 8, 128),
    } | changes
    with Guard(used) as guard:
        config = LaunchConfig(8, split=2)
        grids.run_decode(used["x"], weight, used["y"], None, config)
    return guard, used


def tensors_of(plan: route.RoutePlan) -> dict[str, Tensor]:
    """What kernels read of a routing plan."""
    names = ("tile_expert", "tile_begin", "offsets", "slot")
    return {name: getattr(plan, name) for name in names}


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_width_reads_its_bits_and_writes_each_result_once(bits: int) -> None:
    guard, used = watched(bits)
    codes = guard.read["codes"] + guard.read["extra"]
    assert codes * 8 == bits * 128 * 1024
    floats = guard.read["theta"] + guard.read["theta_extra"]
    assert floats == (2 if bits == 8 else 1) * 4 * 128 * 8
    assert guard.written == {"y": used["y"].nbytes}


def test_routed_products_stay_within_their_tensors() -> None:
    """Tiles are longer than the rows of an expert and of a weight; nothing past them is touched."""
    case = routed("spread")
    gate_up, down = tiles.tile(case.gate_up, 3, paired=True), tiles.tile(case.down, 3)
    plan = route.plan_routes(case.index, case.weights, case.experts, 8)
    h, config = torch.zeros(26, 96, dtype=BF16), LaunchConfig(8)
    table = tensors_of(plan)
    one = {f"gate_{name}": part for name, part in gate_up.tensors().items()}
    with Guard({"x": case.x, "h": h, **one, **table}) as guard:
        grids.run_decode(case.x, gate_up, h, plan, config, act="silu")
    rows = int(plan.offsets[-1])
    assert guard.written == {"h": rows * 96 * 2}
    y = torch.zeros(1, 26, 160)
    with Guard({"h": h, "y": y, **down.tensors(), **table}) as guard:
        grids.run_decode(h, down, y, plan, config, scatter=True)
    assert guard.written == {"y": rows * 160 * 4}


def test_prefill_stays_within_its_tensors_and_reads_each_tile_once() -> None:
    case = routed("spread")
    gate_up, down = tiles.tile(case.gate_up, 3, paired=True), tiles.tile(case.down, 3)
    plan = route.plan_routes(case.index, case.weights, case.experts, 16)
    h, config = torch.zeros(26, 96, dtype=BF16), LaunchConfig(16)
    table = tensors_of(plan)
    one = {f"gate_{name}": part for name, part in gate_up.tensors().items()}
    with Guard({"x": case.x, "h": h, **one, **table}) as guard:
        grids.run_prefill(case.x, gate_up, h, plan, config, act="silu")
    rows, used = int(plan.offsets[-1]), int((plan.tile_expert >= 0).sum())
    assert guard.written == {"h": rows * 96 * 2}
    assert gate_up.extra is not None
    # Every token tile reads the codes of its expert once; the extra words serve both halves.
    assert guard.read["gate_codes"] == used * gate_up.codes[0].nbytes
    assert guard.read["gate_extra"] == used * 2 * gate_up.extra[0].nbytes
    y = torch.zeros(26, 160, dtype=BF16)
    with Guard({"h": h, "y": y, **down.tensors(), **table}) as guard:
        grids.run_prefill(h, down, y, plan, config, scatter=True)
    assert guard.written == {"y": rows * 160 * 2}


@pytest.mark.parametrize("bits", WIDTHS)
def test_prefill_and_decoding_read_exactly_the_bits_of_a_width(bits: int) -> None:
    weight = tiles.tile(random_parts((1, 128, 1024), 128), bits)
    x, y = tokens(16, 1024, BF16), torch.zeros(16, 128, dtype=BF16)
    with Guard({"x": x, "y": y, **weight.tensors()}) as guard:
        grids.run_prefill(x, weight, y, None, LaunchConfig(16))
    again = weight.extra.nbytes if bits == 3 and weight.extra is not None else 0
    assert guard.read["codes"] + guard.read["extra"] == bits * 128 * 1024 // 8 + again
    assert guard.written == {"y": y.nbytes}
    scratch = torch.zeros(128, 1024, dtype=BF16)
    with Guard({"scratch": scratch, **weight.tensors()}) as guard:
        launch.dequantize_rows(weight, BF16, 0, scratch)
    assert guard.read["codes"] + guard.read["extra"] == bits * 128 * 1024 // 8
    assert guard.written == {"scratch": scratch.nbytes}


def test_decoding_awkward_shapes_stays_within_the_scratch_matrix() -> None:
    for paired in (False, True):
        weight = tiles.tile(random_parts((2, 2 * 72, 96), 32), 3, paired=paired)
        scratch = torch.zeros(144, 96, dtype=FP16)
        with Guard({"scratch": scratch, **weight.tensors()}) as guard:
            launch.dequantize_rows(weight, FP16, 1, scratch)
        assert guard.written == {"scratch": scratch.nbytes}


def test_sums_of_parts_stay_within_their_tensors() -> None:
    part = torch.randn(3, 10, 150, generator=torch.Generator().manual_seed(1))
    weights, add = torch.rand(5, 2) + 0.1, torch.ones(5, 150, dtype=BF16)
    weights[3] = 0
    y, h = torch.zeros(5, 150, dtype=BF16), torch.zeros(5, 96, dtype=BF16)
    used = {"part": part, "weights": weights, "add": add}
    with guarded_outputs(used, grids, y=y) as guard:
        grids.combine_rows(part, weights, add, BF16, 2)
    assert guard.written == {"y": y.nbytes}
    assert guard.read["part"] == part.nbytes * 4 // 5  # slots of weight zero are not read
    weight = tiles.tile(random_parts((1, 192, 160), 32), 4, paired=True)
    x, wide = tokens(5, 160, BF16), torch.zeros(2, 5, 256)
    used = {"x": x, "wide": wide, "h": h, **weight.tensors()}
    new_empty = torch.Tensor.new_empty

    def given(self: Tensor, *size: int, **options: Any) -> Tensor:
        return h if size == (5, 96) else new_empty(self, size, **options)

    with pytest.MonkeyPatch.context() as patch, Guard(used) as guard:
        patch.setattr(launch, "parts_buffer", lambda *_, **__: wide)
        patch.setattr(torch.Tensor, "new_empty", given)
        launch.decode_gate_up(x, weight, None, "silu", config=LaunchConfig(8, split=2))
    assert guard.written == {"wide": wide.nbytes, "h": h.nbytes}
    assert guard.read["wide"] == wide.nbytes


def test_the_tile_table_stays_within_its_tensors() -> None:
    case = routed("spread")
    size = 2 * route.most_tiles(26, 3, 8) + 4 + 26
    table = torch.zeros(size, dtype=torch.int32)
    used = {"index": case.index, "weights": case.weights}
    with guarded_outputs(used, route, table=table) as guard:
        plan = route.plan_routes(case.index, case.weights, case.experts, 8, fused=True)
    assert plan.slot.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    assert guard.written == {"table": table.nbytes}


@contextmanager
def guarded_outputs(used: dict[str, Tensor], module: Any, **outputs: Tensor) -> Iterator[Guard]:
    """A guard under which `torch.empty` in `module` gives the outputs, in order."""
    ready = iter(outputs.values())
    stub = SimpleNamespace(**{n: getattr(torch, n) for n in dir(torch)} | {"empty": None})
    stub.empty = lambda *_, **__: next(ready)
    with pytest.MonkeyPatch.context() as patch, Guard(used | outputs) as guard:
        patch.setattr(module, "torch", stub)
        yield guard


class TestTheProofCanFail:
    """Negative controls: each check goes red when what it guards is broken."""

    def test_a_tensor_too_short_is_noticed(self) -> None:
        with pytest.raises(InterpreterError, match=r"load of \d+ addresses outside all tensors"):
            watched(4, x=tokens(8, 512, BF16))

    def test_two_programs_that_store_to_one_place_are_noticed(self) -> None:
        with pytest.raises(InterpreterError, match="store to one place"):
            watched(4, y=torch.zeros(1, 8, 128).expand(2, 8, 128))

    def test_reading_four_bits_for_two_is_noticed(self) -> None:
        guard, _ = watched(4)
        assert (guard.read["codes"] + guard.read["extra"]) * 8 != 2 * 128 * 1024
