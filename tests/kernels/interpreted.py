"""Production kernels in Triton's interpreter, against float64; run by test_numerics.py.

Not collected by itself: TRITON_INTERPRET must be set before Triton is imported, so these tests have
a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.cases import (
    BF16,
    EXACT,
    FP16,
    ROUNDED,
    WIDTHS,
    error,
    expected,
    random_parts,
    routed,
    tokens,
)
from torch import Tensor
from torch.nn.functional import silu
from triton.runtime.errors import InterpreterError

from fissile.kernels import (
    configs,
    dispatch,
    grids,
    launch,
    layout,
    ops,
    route,
    tiles,
    triton_parts,
)
from fissile.kernels.launch import LaunchConfig
from fissile.kernels.proof import interpreter
from fissile.kernels.proof.interpreter import Launches
from fissile.models import load, modeling_fissile, modules_fissile, nested_fissile


@pytest.fixture(autouse=True)
def _mended() -> None:
    interpreter.install()


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("bits", "companding"),
    [*((bits, 1.0) for bits in tiles.BITS), (3, 1.5), (3, 2.0), (4, 1.5), (4, 2.0), (8, 1.5)],
)
def test_dense_products_of_awkward_shapes(bits: int, companding: float, dtype: torch.dtype) -> None:
    """K 448 is no multiple of a block, N 150 none of a tile, 5 tokens none of a token tile."""
    parts = random_parts((1, 150, 448), 64)
    weight = tiles.tile(parts, bits, companding=companding)
    x, bias = tokens(5, 448, dtype), tokens(1, 150, dtype)[0]
    want = x.double() @ layout.dequantize(parts, bits, companding)[0].double().T
    part = torch.full((1, 5, 150), 7.0)
    grids.run_decode(x, weight, part, None, LaunchConfig(8))
    assert error(part[0], want) < EXACT
    unit = 2e-3 if dtype == BF16 else 3e-4
    for other in (LaunchConfig(8, split=2), LaunchConfig(16, 64, portable=True)):
        got = launch.decode_dense(x, weight, bias=bias, config=other)
        assert got.dtype == dtype
        assert error(got, want + bias.double()) < 2 * unit
    got = launch.prefill_dense(x, weight, bias=bias, config=LaunchConfig(16))
    assert error(got, want + bias.double()) < 3 * unit


@pytest.mark.parametrize("group_size", tiles.GROUP_SIZES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_groups_of_every_size(bits: int, group_size: int) -> None:
    parts = random_parts((1, 64, 512), group_size, seed=bits)
    weight, x = tiles.tile(parts, bits), tokens(3, 512, BF16)
    want = x.double() @ layout.dequantize(parts, bits)[0].double().T
    part = torch.full((1, 3, 64), 7.0)
    grids.run_decode(x, weight, part, None, LaunchConfig(8, 64))
    assert error(part[0], want) < EXACT
    assert error(launch.prefill_dense(x, weight, config=LaunchConfig(16, 64)), want) < 2 * ROUNDED


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("bits", WIDTHS)
def test_decoding_to_a_scratch_matrix(bits: int, portable: bool) -> None:
    parts = random_parts((2, 2 * 72, 96), 32)
    want = layout.dequantize(parts, bits)
    for paired in (False, True):
        weight = tiles.tile(parts, bits, paired=paired)
        got = launch.dequantize_rows(weight, FP16, portable=portable)
        assert error(got, want) < 5e-4
        scratch = torch.full((144, 96), 7.0, dtype=FP16)
        launch.dequantize_rows(weight, FP16, 1, scratch, portable=portable)
        assert torch.equal(scratch, got[1])


CASES = [("spread", 2, "silu"), ("hot", 4, "gelu"), ("spread", 3, "gelu_tanh"), ("hot", 8, "silu")]


@pytest.mark.parametrize(("kind", "bits", "act"), CASES)
def test_experts_of_few_tokens(kind: str, bits: int, act: launch.Activation) -> None:
    case = routed(kind)
    gate_up = tiles.tile(case.gate_up, bits, paired=True)
    down = tiles.tile(case.down, bits)
    plan = route.plan_routes(case.index, case.weights, case.experts, 8)
    want = expected(case, bits, act)
    for config in (LaunchConfig(8, 64), LaunchConfig(8, split=2)):
        h = launch.decode_gate_up(case.x, gate_up, plan, act, config=config)
        got = launch.decode_down(h, down, plan, case.weights, add=case.add, config=config)
        assert error(got, want) < ROUNDED


@pytest.mark.parametrize(("kind", "bits", "act"), CASES)
def test_experts_of_many_tokens(kind: str, bits: int, act: launch.Activation) -> None:
    case = routed(kind)
    gate_up = tiles.tile(case.gate_up, bits, paired=True)
    down = tiles.tile(case.down, bits)
    plan = route.plan_routes(case.index, case.weights, case.experts, 16)
    config = LaunchConfig(16)
    h = launch.prefill_gate_up(case.x, gate_up, plan, act, config=config)
    got = launch.prefill_down(h, down, plan, case.weights, add=case.add, config=config)
    assert error(got, expected(case, bits, act)) < 2 * ROUNDED


def test_an_unrouted_mlp_of_two_widths() -> None:
    x = tokens(3, 128, BF16)
    up = random_parts((1, 2 * 256, 128), 128, seed=6)
    down = random_parts((1, 64, 256), 128, seed=7)
    gate_up, weight = tiles.tile(up, 4, paired=True), tiles.tile(down, 2)
    gate, other = (x.double() @ layout.dequantize(up, 4)[0].double().T).chunk(2, -1)
    want = (silu(gate) * other) @ layout.dequantize(down, 2)[0].double().T
    for config in (LaunchConfig(8), LaunchConfig(8, 64), LaunchConfig(8, split=2)):
        h = launch.decode_gate_up(x, gate_up, None, "silu", config=config)
        assert error(launch.decode_down(h, weight, None, None, config=config), want) < ROUNDED


@pytest.mark.parametrize("companding", layout.COMPANDED)
def test_decoding_companded_weights(companding: float) -> None:
    parts = random_parts((1, 24, 96), 32)
    for bits in (3, 4, 6):
        for portable in (False, True):
            weight = tiles.tile(parts, bits, companding=companding)
            got = launch.dequantize_rows(weight, FP16, portable=portable)
            assert error(got, layout.dequantize(parts, bits, companding)) < 5e-4


class TestOneTokenOfALayer:
    """What a layer of experts launches in decoding, as the operators choose it for a GPU."""

    @pytest.fixture(autouse=True)
    def _a_large_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(configs, "processors", lambda: 132)

    def experts(self, index: list[list[int]]) -> tuple[Launches, Tensor, Tensor]:
        case = routed("spread")
        gate_up, down = tiles.tile(case.gate_up, 4, paired=True), tiles.tile(case.down, 4)
        case.x, case.add, case.index = case.x[:1], torch.zeros(1, 160), torch.tensor(index)
        case.weights = case.weights[:1, : case.index.shape[1]]
        plan = route.plan_routes(case.index, case.weights, case.experts, 8)
        with Launches() as seen:
            got = ops._gated(case.x, gate_up, down, "silu", plan, case.weights)
        return seen, got, expected(case, 4, "silu")

    def test_three_launches(self) -> None:
        seen, got, want = self.experts([[0, 2]])
        assert seen.names == ["decode_kernel", "decode_kernel", "combine_rows_kernel"]
        assert error(got, want) < ROUNDED
        # Gate and up are cut into narrow tiles instead of parts, which would need to be added up.
        assert [grid[2] for grid in seen.grids[:2]] == [1, 1]
        assert seen.grids[0][0] == 4 * 2

    def test_a_matrix_is_one_launch_and_an_mlp_three_at_most(self) -> None:
        case = routed("spread")
        weight = tiles.tile(random_parts((1, 64, 512), 64), 4)
        gate_up, down = (
            tiles.tile({name: part[:1] for name, part in parts.items()}, 4, paired=paired)
            for parts, paired in ((case.gate_up, True), (case.down, False))
        )
        x, bias = tokens(1, 512, BF16), tokens(1, 64, BF16)[0]
        with Launches() as seen:
            launch.decode_dense(x, weight, bias=bias)
        assert seen.names == ["decode_kernel"]
        with Launches() as seen:
            ops._gated(case.x[:1], gate_up, down, "silu", None, None)
        assert seen.names[:2] == ["decode_kernel"] * 2
        assert seen.names[2:] in ([], ["combine_rows_kernel"])

    def test_what_runs_does_not_depend_on_the_route(self) -> None:
        """So a captured graph replays any route, and nothing waits for the host."""
        first, other = self.experts([[0, 2]])[0], self.experts([[1, 1]])[0]
        assert (first.names, first.grids) == (other.names, other.grids)

    def test_a_read_by_the_host_is_noticed(self) -> None:
        with Launches() as seen:
            assert torch.ones(2).sum().item() == 2
        assert seen.names[-1] == "_local_scalar_dense"


def test_a_converted_model_computes_what_it_does_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attention, shared and routed experts of a whole model through the production kernels."""
    if (folder := os.environ.get("FISSILE_TEST_MODEL")) is None:
        pytest.skip("no model given")
    model: Any = load(Path(folder), bits=3)
    ids = torch.tensor([[5, 17, 230, 8, 99]])
    with torch.inference_mode():
        want = model(input_ids=ids).logits
    model.half()
    for name in ("nested_linear", "nested_mlp", "nested_experts", "plan_table"):
        monkeypatch.setattr(dispatch, name, getattr(ops, name)._init_fn)
    monkeypatch.setattr(ops, "plan_routes", partial(route.plan_routes, fused=True))
    for module in (nested_fissile, modules_fissile):
        monkeypatch.setattr(module, "kernels_for", lambda *_: dispatch)
    monkeypatch.setattr(modeling_fissile, "one_step", lambda _: dispatch.one_step())
    with torch.inference_mode(), Launches() as seen:
        got = model(input_ids=ids).logits
    assert error(got, want) < 1e-2
    assert seen.names.count("route_kernel") == 1  # for two layers
    assert seen.names.count("decode_kernel") == 2 * (4 + 2 + 2)
    assert not any(name.startswith("embedding_bag_") for name in seen.names)


def test_no_tokens() -> None:
    case = routed("spread")
    gate_up, down = tiles.tile(case.gate_up, 2, paired=True), tiles.tile(case.down, 2)
    x, weights = case.x[:0], case.weights[:0]
    plan = route.plan_routes(case.index[:0], weights, case.experts, 8)
    h = launch.decode_gate_up(x, gate_up, plan, "silu")
    assert launch.decode_down(h, down, plan, weights).shape == (0, 160)
    h = launch.prefill_gate_up(x, gate_up, plan, "silu", config=LaunchConfig(8))
    got = launch.prefill_down(h, down, plan, weights, config=LaunchConfig(8))
    assert got.shape == launch.decode_dense(h, down).shape == (0, 160)


@pytest.mark.parametrize("kind", ["spread", "hot"])
def test_the_table_in_one_launch_equals_the_table_of_torch(kind: str) -> None:
    case = routed(kind)
    for block in (8, 16):
        one = route.plan_routes(case.index, case.weights, case.experts, block, fused=True)
        other = route.plan_routes(case.index, case.weights, case.experts, block, fused=False)
        for name in ("tile_expert", "tile_begin", "offsets", "slot"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


class TestManyRows:
    """Where decoding to scratch begins, and where torch's grouped product would ask the host."""

    @pytest.fixture(autouse=True)
    def _a_table_of_few_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        table = configs.Table("few", 1, 2, (), None)
        monkeypatch.setattr(configs, "current_table", lambda: table)

    @pytest.mark.parametrize("dtype", [BF16, FP16])
    @pytest.mark.parametrize("kind", ["spread", "hot"])
    def test_experts(self, kind: str, dtype: torch.dtype) -> None:
        case = routed(kind)
        gate_up, down = tiles.tile(case.gate_up, 4, paired=True), tiles.tile(case.down, 4)
        case.x, case.add = case.x.to(dtype), torch.zeros_like(case.x)
        rows = -(-case.index.numel() // case.experts)
        block = configs.plan_block(4, rows)
        plan = route.plan_routes(case.index, case.weights, case.experts, block)
        with Launches() as seen:
            got = ops._gated(case.x, gate_up, down, "silu", plan, case.weights)
        assert error(got, expected(case, 4, "silu")) < 2 * ROUNDED
        decoded = seen.names.count("dequantize_kernel")
        assert (decoded, seen.names.count("prefill_kernel")) == (
            (2, 0) if dtype == BF16 else (0, 2)
        )
        assert "_local_scalar_dense" not in seen.names or dtype == BF16

    def test_one_matrix_and_an_mlp(self) -> None:
        parts = random_parts((1, 40, 96), 32)
        x, bias = tokens(5, 96, FP16), tokens(1, 40, FP16)[0]
        run: Any = ops.nested_linear._init_fn
        weight = ops.flatten(tiles.tile(parts, 3))
        with Launches() as seen:
            got = run(x, *weight, bias)
        want = x.double() @ layout.dequantize(parts, 3)[0].double().T + bias.double()
        assert error(got, want) < 2e-3
        assert seen.names[0] == "dequantize_kernel"
        wide, narrow = random_parts((1, 64, 96), 32, seed=6), random_parts((1, 96, 32), 32, seed=7)
        gate_up, down = tiles.tile(wide, 4, paired=True), tiles.tile(narrow, 4)
        got = ops._gated(x, gate_up, down, "silu", None, None)
        gate, up = (x.double() @ layout.dequantize(wide, 4)[0].double().T).chunk(2, -1)
        want = (silu(gate) * up) @ layout.dequantize(narrow, 4)[0].double().T
        assert error(got, want) < 4e-3


def test_every_launch_is_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[str] = []
    names = ("decode_kernel", "prefill_kernel", "dequantize_kernel", "combine_rows_kernel")

    @contextmanager
    def watched_device(_: Tensor) -> Iterator[None]:
        inside.append("in")
        yield

    for module in (grids, launch, route):
        monkeypatch.setattr(module, "on_device", watched_device)
    with Launches() as seen:
        test_experts_of_few_tokens("spread", 2, "silu")
        test_experts_of_many_tokens("spread", 2, "silu")
        launch.dequantize_rows(tiles.tile(random_parts((1, 24, 96), 32), 4), FP16)
        case = routed("hot")
        route.plan_routes(case.index, case.weights, case.experts, 8, fused=True)
    kernels = [n for n in seen.names if n.endswith("_kernel")]
    assert {*names, "combine_neurons_kernel", "route_kernel"} == {*kernels}
    assert len(inside) == len(kernels)


class TestTheProofCanFail:
    """Negative controls: each check goes red when what it guards is broken."""

    def test_a_wrong_mask_gives_a_wrong_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        key = (2, 0, False, 0)
        text = triton_parts._UNPACK[key]
        monkeypatch.setitem(triton_parts._UNPACK, key, text.replace("0x000c000c", "0x00080008"))
        with pytest.raises(AssertionError):
            test_groups_of_every_size(2, 64)

    def test_unmended_bfloat16_is_refused(self) -> None:
        import triton
        import triton.language as tl

        @triton.jit
        def double(x_ptr: tl.tensor) -> None:
            i = tl.arange(0, 16)
            tl.store(x_ptr + i, tl.load(x_ptr + i) * 2)

        with pytest.raises(InterpreterError, match="cast to float32 first"):
            double[(1,)](torch.ones(16, dtype=BF16))
