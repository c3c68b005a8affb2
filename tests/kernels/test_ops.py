"""The torch operators: opcheck, compilation, and their CPU kernels against float64."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fissile.kernels import dispatch, ops
from fissile.kernels.configs import Table, choose_config, choose_method, split_for, table_name
from fissile.kernels.defaults import LaunchConfig
from fissile.kernels.device import on_device
from fissile.kernels.layout import (
    WIDTHS,
    dequantize,
    encode_theta,
    pack,
    pack_residual,
    segment_names,
)
from fissile.kernels.tiles import TiledWeight, tile, untile
from fissile.models import nested_fissile

BITS, GROUP, D, F, E, T, K = 4, 32, 64, 96, 3, 5, 2


def stored(size: tuple[int, ...], seed: int, bits: int = BITS) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    codes, residual = (
        torch.randint(0, 16, size, generator=rng, dtype=torch.uint8) for _ in range(2)
    )
    groups = (*size[:-1], size[-1] // GROUP)
    parts = pack(codes) | pack_residual(residual)
    for width in (min(bits, 4), bits):
        scale = torch.rand(groups, generator=rng) * 0.02 + 0.01
        parts[f"theta_{width}"] = encode_theta(scale, -7 * scale)
    return {name: parts[name] for name in segment_names(bits, (min(bits, 4), bits))}


def rand(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def layer() -> dict[str, Any]:
    """Weights in both orders, activations and a route in which a slot has weight zero."""
    wide, narrow = stored((E, 2 * F, D), 1), stored((E, D, F), 2)
    weights = torch.ones(T, K)
    weights[1, 1] = 0
    weights[3, 0] = 0.5
    index = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]])
    return {
        "wide": tile(wide, BITS, paired=True),
        "narrow": tile(narrow, BITS),
        "dense_wide": dequantize(wide, BITS).double(),
        "dense_narrow": dequantize(narrow, BITS).double(),
        "x": rand(T, D, seed=3),
        "route": (index, weights),
    }


def experts_in_float64(layer: dict[str, Any]) -> Tensor:
    x, (index, weights) = layer["x"].double(), layer["route"]
    y = torch.zeros(T, D, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            gate, up = (layer["dense_wide"][index[t, k]] @ x[t]).chunk(2)
            h = torch.nn.functional.silu(gate) * up
            y[t] += weights[t, k] * (layer["dense_narrow"][index[t, k]] @ h)
    return y


def close(got: Tensor, want: Tensor, relative: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert float((got.double() - want).norm() / want.norm()) < relative


def test_operators_pass_opcheck(layer: dict[str, Any]) -> None:
    wide, narrow = ops.flatten(layer["wide"]), ops.flatten(layer["narrow"])
    first, second = ops.flatten(layer["wide"].expert(0)), ops.flatten(layer["narrow"].expert(0))
    index, weights = layer["route"]
    plan = ops.plan_table(index, weights, E, BITS)
    x = layer["x"]
    eight = ops.flatten(tile(stored((24, D), 5, 8), 8))
    for operator, arguments in (
        (ops.nested_linear, (x, *eight, None)),
        (ops.nested_linear, (x, *eight, rand(24, seed=6))),
        (ops.nested_mlp, (x, *first, *second, "gelu")),
        (ops.plan_table, (index, weights, E, BITS)),
        (ops.nested_experts, (x, weights, plan, *wide, *narrow, "silu")),
    ):
        done = torch.library.opcheck(operator, arguments)
        assert set(done.values()) == {"SUCCESS"}, done


def test_linear_with_bias_in_float64(layer: dict[str, Any]) -> None:
    parts, bias = stored((24, D), 5, 8), rand(24, seed=6)
    got = dispatch.linear(layer["x"].view(1, T, D), tile(parts, 8), bias)
    want = layer["x"].double() @ dequantize(parts, 8).double().T + bias
    close(got, want.view(1, T, 24))


@pytest.mark.parametrize("activation", dispatch.ACTIVATIONS)
def test_mlp_in_float64(layer: dict[str, Any], activation: str) -> None:
    from transformers.activations import ACT2FN

    got = dispatch.mlp(layer["x"], layer["wide"].expert(1), layer["narrow"].expert(1), activation)
    gate, up = (layer["x"].double() @ layer["dense_wide"][1].T).chunk(2, dim=-1)
    close(got, (ACT2FN[activation](gate) * up) @ layer["dense_narrow"][1].T)


def test_experts_in_float64(layer: dict[str, Any]) -> None:
    arguments = (layer["route"], layer["wide"], layer["narrow"], "silu")
    close(dispatch.experts(layer["x"], *arguments), experts_in_float64(layer))
    half = dispatch.experts(layer["x"].bfloat16(), *arguments)
    assert half.dtype == torch.bfloat16
    close(half, experts_in_float64(layer), 2e-2)


def test_no_more_than_one_expert_is_decoded_at_a_time(
    layer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counted(weight: TiledWeight) -> Tensor:
        decoded.append(weight.shape[0])
        return untile(weight)

    monkeypatch.setattr(ops, "untile", counted)
    weights = (layer["wide"], layer["narrow"], "silu")
    close(dispatch.experts(layer["x"], layer["route"], *weights), experts_in_float64(layer))
    assert decoded == [1] * (2 * E)


def test_a_step_sorts_once_and_never_mixes_routes(
    layer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []

    def counted(*arguments: Any) -> Tensor:
        made.append(ops.plan_table(*arguments))
        return made[-1]

    monkeypatch.setattr(dispatch, "plan_table", counted)
    weights = (layer["wide"], layer["narrow"], "silu")
    index, ones = layer["route"]
    other = (index.flip(0).clone(), ones)
    with dispatch.one_step():
        first = [dispatch.experts(layer["x"], layer["route"], *weights) for _ in range(3)]
        assert len(made) == 1
        second = dispatch.experts(layer["x"], other, *weights)
    assert len(made) == 2
    assert torch.equal(first[0], first[2])
    torch.testing.assert_close(dispatch.experts(layer["x"], other, *weights), second)
    assert not torch.allclose(first[0], second)
    assert len(made) == 3


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_calls_are_the_same(layer: dict[str, Any], backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    index, ones = layer["route"]

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        route = (index, weights)
        return dispatch.experts(x, route, layer["wide"], layer["narrow"], "silu") + 1

    compiled = torch.compile(run, backend=backend, fullgraph=True, dynamic=True)
    for rows in (T, 3):
        arguments = layer["x"][:rows], index[:rows], ones[:rows]
        torch.testing.assert_close(compiled(*arguments), run(*arguments))


def test_tables_name_the_gpu_and_choose_by_rows(layer: dict[str, Any]) -> None:
    name = table_name("NVIDIA H100 80GB HBM3", "3.6.0+cu128")
    assert name == "nvidia-h100-80gb-hbm3-triton-3.6"
    fast, slow = LaunchConfig(8, 64, 4, 3, 2), LaunchConfig(32, 128, 8, 4, 64)
    entries: Any = (
        ("decode", 4, 64, 8, slow),
        ("decode", 4, 32, 8, fast),
        ("decode", 4, 32, 64, slow),
    )
    table = Table(name, 64, 1330, entries, "2026-01-01")
    assert [choose_method(r, 4, table) for r in (1, 64, 65, 1329, 1330)] == [
        "decode",
        "decode",
        "prefill",
        "prefill",
        "scratch",
    ]
    assert choose_config("decode", layer["narrow"], 8, table=table).num_warps == 4
    found = choose_config("decode", layer["narrow"], 9, table=table)
    assert (found.block_m, found.num_warps) == (32, 8)
    assert found.split == layer["narrow"].codes.shape[2]  # never more parts than blocks
    index, weights = layer["route"]
    plan = ops.split_plan(ops.plan_table(index, weights, E, BITS), weights, E, BITS)
    assert choose_config("decode", layer["narrow"], 9, plan, table).block_m == 8
    assert split_for(28, 2, 32, 132) * 28 * 2 >= 2 * 132
    assert split_for(1000, 1, 32, 132) == 1


def test_what_the_kernels_refuse_has_a_reason() -> None:
    half = torch.bfloat16
    assert "device cpu" in str(dispatch.refusal("cpu", half, 4, 64))
    if dispatch.triton_version() is None:
        assert dispatch.refusal("cuda", half, 4, 64) == "triton is not installed"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "activations are torch.float32"),
        ({"bits": 5}, "bits 5"),
        ({"group_size": 48}, "group_size 48"),
        ({"companding": 3.0}, "companding 3.0"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    dispatch.refusal.cache_clear()
    usual: dict[str, Any] = {"dtype": torch.bfloat16, "bits": 4, "group_size": 64}
    assert dispatch.refusal("cuda", **usual, ask_driver=False) is None
    assert reason in str(dispatch.refusal("cuda", **(usual | changes), ask_driver=False))
    dispatch.refusal.cache_clear()


def test_the_report_names_the_code_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, starts in ((True, "triton ("), (False, "decoded (triton is not installed")):
        monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name, t=there: t or None)
        dispatch.refusal.cache_clear()
        found = dispatch.report("GPU without a table")
        assert all(found[f"{bits} bits"].startswith(starts) for bits in WIDTHS)
        assert ("held as 8 bits" in found["6 bits"]) is there
        assert "prefill kernels between" in found["rows of an expert"]
    dispatch.refusal.cache_clear()


def test_the_report_refuses_old_gpus_and_says_what_it_did_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    dispatch.refusal.cache_clear()
    old = dispatch.report("Tesla T4", capability=(7, 5))["4 bits"]
    assert old == "decoded (the GPU has compute capability 7.5, the kernels need 8.0)"
    assert "which was not read" not in dispatch.report("A100", capability=(8, 0))["4 bits"]
    assert dispatch.report("A100", capability=(8, 0))["4 bits"].startswith("triton (")
    assert "which was not read" in dispatch.report("some GPU")["4 bits"]
    dispatch.refusal.cache_clear()


def test_gates_of_a_trained_router_take_the_path_with_gradients() -> None:
    gates = torch.ones(T, K, requires_grad=True)
    x: Any = SimpleNamespace(is_cpu=False, requires_grad=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nested_fissile, "compiled_kernels", lambda: (dispatch, ""))
        assert nested_fissile.kernels_for([], x, "silu", gates) is None
        assert nested_fissile.kernels_for([], x, "silu", gates.detach()) is dispatch
        with torch.no_grad():
            assert nested_fissile.kernels_for([], x, "silu", gates) is dispatch


def test_launches_happen_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.device] = []

    def device(which: torch.device) -> nullcontext[None]:
        seen.append(which)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    second: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1))
    with on_device(second), on_device(torch.zeros(1)):
        assert seen == [torch.device("cuda", 1)]
