"""The kernels on a GPU: every product of the benchmark's sweep against float64, graphs, a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.kernels import dispatch, ops, route
from fissile.kernels.tiles import tile, untile
from fissile.models import load
from fissile.run.bench_kernels import relative_error
from fissile.run.kernel_cases import LLAMA_3_8B, Case, Shape, build_fissile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
# One on each side of every change of kernel: tiles of 8, 16, 32 tokens, prefill, scratch.
TOKENS = (1, 2, 8, 9, 16, 33, 64, 65, 256, 1329, 2048)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", LLAMA_3_8B, ids=lambda shape: shape.name)
def test_every_shape_and_batch(shape: Shape, bits: int) -> None:
    for tokens in TOKENS:
        built = build_fissile(Case(shape, tokens, bits, 64, "cuda", 1, tokens))
        assert built.truth is not None
        assert relative_error(built.calls[0](), built.truth) < 1e-2, (tokens, built.how)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_awkward_sizes(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """Rows are no multiple of a tile, inputs none of a block."""
    shape = Shape("odd", "linear", 328, 5 * group_size)
    case = Case(shape, 1, bits, group_size, "cuda", 1, 0)
    weight = case.weight((328, 5 * group_size), 3)
    bias = torch.linspace(-1, 1, 328, device="cuda").to(dtype)
    for tokens in (0, 1, 7, 40, 200, 1500):
        x = torch.randn(tokens, 5 * group_size, device="cuda").to(dtype)
        want = x.double() @ untile(weight)[0].double().T + bias.double()
        got = dispatch.linear(x, weight, bias)
        assert got.shape == want.shape
        assert not tokens or relative_error(got, want) < 1e-2


@pytest.mark.parametrize("tokens", [1, 13, 700])
def test_one_hot_expert_and_empty_ones(tokens: int) -> None:
    case = Case(LLAMA_3_8B[-2].smaller(8), tokens, 4, 64, "cuda", 1, 0)
    pair = case.pair(2)
    index = torch.full((tokens, 2), 3, device="cuda")
    index[:, 1] = 5
    weights = torch.ones(tokens, 2, device="cuda", dtype=torch.bfloat16)
    weights[:, 1] = 0
    got = dispatch.experts(case.activations(), (index, weights), *pair, "silu")
    plain = case.activations().double()
    gate, up = (plain @ untile(pair[0].expert(3))[0].double().T).chunk(2, -1)
    want = (torch.nn.functional.silu(gate) * up) @ untile(pair[1].expert(3))[0].double().T
    assert relative_error(got, want) < 1e-2


@pytest.mark.parametrize("tokens", [1, 40, 1500])
def test_a_captured_graph_follows_another_route(tokens: int) -> None:
    case = Case(LLAMA_3_8B[-2].smaller(8), tokens, 3, 64, "cuda", 1, 0)
    x, (index, weights), pair = case.activations(), case.route(), case.pair(2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dispatch.experts(x, (index, weights), *pair, "silu")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dispatch.experts(x, (index, weights), *pair, "silu")
    index.copy_(index.flip(0).roll(1, 1))
    x.copy_(x.flip(0))
    graph.replay()
    torch.testing.assert_close(y, dispatch.experts(x, (index, weights), *pair, "silu"))


def test_the_table_of_a_route_is_that_of_torch() -> None:
    index = torch.randint(0, 8, (60, 2), device="cuda")
    weights = (torch.rand(60, 2, device="cuda") > 0.2).float()
    one, other = (route.plan_routes(index, weights, 8, 8, fused=way) for way in (True, False))
    for name in ("tile_expert", "tile_begin", "offsets", "slot"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_compiled_calls_are_the_same() -> None:
    case = Case(LLAMA_3_8B[-2].smaller(8), 9, 4, 64, "cuda", 1, 0)
    x, (index, weights), pair = case.activations(), case.route(), case.pair(2)

    def run(x: torch.Tensor) -> torch.Tensor:
        return dispatch.experts(x, (index, weights), *pair, "silu") + 1

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_converted_model_computes_what_it_does_on_the_cpu(finished_run: Path, bits: int) -> None:
    ids = torch.arange(5, 45)[None]
    model: Any = load(finished_run, bits=bits)
    with torch.inference_mode():
        want = model(input_ids=ids).logits
        got = model.half().cuda()(input_ids=ids.cuda()).logits.cpu()
    assert relative_error(got, want.double()) < 2e-2


def test_the_reason_is_that_of_this_gpu() -> None:
    weight = tile(Case(LLAMA_3_8B[2], 1, 4, 64, "cuda", 1, 0).parts((128, 128), 1), 4)
    capability = torch.cuda.get_device_capability()
    old = dispatch.refusal("cuda", torch.bfloat16, weight.bits, weight.group_size) is not None
    assert old is (capability < (8, 0))
    assert ops.grouped_product(torch.zeros(1, 64).cuda().bfloat16(), 64) is (capability >= (9, 0))
