"""Products with nested weights as torch operators: opaque to compilers, safe in CUDA graphs.

    fissile::nested_linear    x W^T + b
    fissile::nested_mlp       down(act(gate(x)) * up(x))
    fissile::nested_experts   sum over a token's experts of weight times that
    fissile::plan_routes      tokens sorted by expert, shared by all layers of a step

Each has a fake, so shapes are known without running it, and a CPU kernel, which is the readable
float32 reference. On a GPU the Triton launchers run, or, from so many rows on that decoding costs
little, the weight is decoded to scratch and multiplied by cuBLAS.

A weight crosses the operator's border as its tensors and seven integers, see `flatten`.

Shapes: T tokens, K inputs or slots per token, N rows, F neurons, E experts, R = T * slots rows
sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from fissile.kernels import launch
from fissile.kernels.configs import Method, choose_config, choose_method, plan_block
from fissile.kernels.defaults import LaunchConfig
from fissile.kernels.launch import Activation
from fissile.kernels.route import RoutePlan, most_tiles, plan_routes
from fissile.kernels.tiles import TiledWeight, untile

_FIELDS = ("codes", "theta", "extra", "theta_extra")


def flatten(weight: TiledWeight) -> tuple[list[Tensor], list[int]]:
    """Tensors, and [bits, group size, E, N, K, paired, 2 * companding]."""
    found = weight.tensors()
    flags = int(weight.paired), round(2 * weight.companding)
    about = [weight.bits, weight.group_size, *weight.shape, *flags]
    return [found[name] for name in _FIELDS if name in found], about


def unflatten(tensors: Sequence[Tensor], about: Sequence[int]) -> TiledWeight:
    """Inverse of `flatten`."""
    bits, group_size, experts, rows, inputs, paired, companding = about
    codes, theta, *rest = tensors
    extra = rest[0] if rest else None
    theta_extra = rest[1] if len(rest) > 1 else None
    flags = bool(paired), companding / 2
    shape = (experts, rows, inputs)
    return TiledWeight(codes, extra, theta, theta_extra, bits, group_size, shape, *flags)


@torch.library.custom_op(
    "fissile::nested_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor[] weight, int[] about, Tensor? bias) -> Tensor",
)
def nested_linear(
    x: Tensor, weight: Sequence[Tensor], about: Sequence[int], bias: Tensor | None
) -> Tensor:
    """x W^T (+ bias), (T, N) in the dtype of x.

    Args:
        x: (T, K).
        weight: tensors of one matrix, see `flatten`.
        about: the integers.
        bias: (N,).
    """
    tiled = unflatten(weight, about)
    x = x.contiguous()
    method, config = how_linear(len(x), tiled)
    if config is None:
        dense = launch.dequantize_rows(tiled, x.dtype, expert=0)
        return torch.nn.functional.linear(x, dense, bias)
    run = launch.decode_dense if method == "decode" else launch.prefill_dense
    return run(x, tiled, bias=bias, config=config)


@nested_linear.register_kernel("cpu")
def _(x: Tensor, weight: Sequence[Tensor], about: Sequence[int], bias: Tensor | None) -> Tensor:
    y = x.float() @ untile(unflatten(weight, about))[0].T
    return (y if bias is None else y + bias).to(x.dtype)


@nested_linear.register_fake
def _(x: Tensor, weight: Sequence[Tensor], about: Sequence[int], bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], about[3])


@torch.library.custom_op(
    "fissile::nested_mlp",
    mutates_args=(),
    schema="(Tensor x, Tensor[] gate_up, int[] gate_up_about, Tensor[] down, int[] down_about,"
    " str act) -> Tensor",
)
def nested_mlp(
    x: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_about: Sequence[int],
    down: Sequence[Tensor],
    down_about: Sequence[int],
    act: str,
) -> Tensor:
    """down(act(gate(x)) * up(x)), (T, D) in the dtype of x.

    Args:
        x: (T, D).
        gate_up: paired rows of gate and up projections, see `flatten`.
        gate_up_about: the integers.
        down: the down projection.
        down_about: the integers.
        act: "silu", "gelu" or "gelu_tanh".
    """
    wide, narrow = unflatten(gate_up, gate_up_about), unflatten(down, down_about)
    return _gated(x.contiguous(), wide, narrow, cast(Activation, act), None, None)


@nested_mlp.register_kernel("cpu")
def _(
    x: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_about: Sequence[int],
    down: Sequence[Tensor],
    down_about: Sequence[int],
    act: str,
) -> Tensor:
    wide = untile(unflatten(gate_up, gate_up_about))[0]
    narrow = untile(unflatten(down, down_about))[0]
    return _reference(x, wide, narrow, act).to(x.dtype)


@nested_mlp.register_fake
def _(
    x: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_about: Sequence[int],
    down: Sequence[Tensor],
    down_about: Sequence[int],
    act: str,
) -> Tensor:
    return x.new_empty(x.shape[0], down_about[3])


@torch.library.custom_op(
    "fissile::nested_experts",
    mutates_args=(),
    schema="(Tensor x, Tensor weights_TK, Tensor plan, Tensor[] gate_up,"
    " int[] gate_up_about, Tensor[] down, int[] down_about, str act) -> Tensor",
)
def nested_experts(
    x: Tensor,
    weights_TK: Tensor,
    plan: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_about: Sequence[int],
    down: Sequence[Tensor],
    down_about: Sequence[int],
    act: str,
) -> Tensor:
    """Sum over a token's experts of weight times the expert's MLP, (T, D) in the dtype of x.

    Args:
        x: (T, D).
        weights_TK: weight of each choice; where it is zero nothing is computed.
        plan: from `fissile::plan_routes`, made for weights of this width.
        gate_up: stack of paired gate and up projections, see `flatten`.
        gate_up_about: the integers.
        down: stack of down projections.
        down_about: the integers.
        act: "silu", "gelu" or "gelu_tanh".
    """
    wide, narrow = unflatten(gate_up, gate_up_about), unflatten(down, down_about)
    route = split_plan(plan, weights_TK, wide.shape[0], wide.kernel_bits)
    return _gated(x.contiguous(), wide, narrow, cast(Activation, act), route, weights_TK)


@nested_experts.register_kernel("cpu")
def _(
    x: Tensor,
    weights_TK: Tensor,
    plan: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_about: Sequence[int],
    down: Sequence[Tensor],
    down_about: Sequence[int],
    act: str,
) -> Tensor:
    wide, narrow = unflatten(gate_up, gate_up_about), unflatten(down, down_about)
    route = split_plan(plan, weights_TK, wide.shape[0], wide.kernel_bits)
    out_TD = torch.zeros(len(x), narrow.shape[1])
    for expert in range(wide.shape[0]):
        slot = route.slot[route.offsets[expert] : route.offsets[expert + 1]].long()
        if not len(slot):
            continue
        token = slot // route.top_k
        # One expert at a time: the stack as floats would take many times its memory.
        wide_ND, narrow_DF = untile(wide.expert(expert))[0], untile(narrow.expert(expert))[0]
        y = _reference(x[token], wide_ND, narrow_DF, act)
        out_TD.index_add_(0, token, y * weights_TK.reshape(-1)[slot, None])
    return out_TD.to(x.dtype)


@nested_experts.register_fake
def _(
    x: Tensor,
    weights_TK: Tensor,
    plan: Tensor,
    gate_up: Sequence[Tensor],
    gate_up_about: Sequence[int],
    down: Sequence[Tensor],
    down_about: Sequence[int],
    act: str,
) -> Tensor:
    return x.new_empty(x.shape[0], down_about[3])


@torch.library.custom_op(
    "fissile::plan_routes",
    mutates_args=(),
    schema="(Tensor index_TK, Tensor weights_TK, int num_experts, int bits) -> Tensor",
)
def plan_table(index_TK: Tensor, weights_TK: Tensor, num_experts: int, bits: int) -> Tensor:
    """The plan of a step as one int32 tensor; `split_plan` takes it apart.

    Args:
        index_TK: chosen experts.
        weights_TK: weight of each choice; where it is zero nothing is computed.
        num_experts: E.
        bits: of the weights, from which the rows of a tile follow.
    """
    block = plan_block(bits, -(-index_TK.numel() // num_experts))
    plan = plan_routes(index_TK, weights_TK, num_experts, block)
    return torch.cat([plan.tile_expert, plan.tile_begin, plan.offsets, plan.slot])


@plan_table.register_fake
def _(index_TK: Tensor, weights_TK: Tensor, num_experts: int, bits: int) -> Tensor:
    rows = index_TK.shape[0] * index_TK.shape[1]
    block = plan_block(bits, -(-rows // num_experts))
    size = 2 * most_tiles(rows, num_experts, block) + num_experts + 1 + rows
    return index_TK.new_empty(size, dtype=torch.int32)


def split_plan(table: Tensor, weights_TK: Tensor, num_experts: int, bits: int) -> RoutePlan:
    """`fissile::plan_routes`' result as a plan."""
    rows, top_k = weights_TK.numel(), weights_TK.shape[1]
    block = plan_block(bits, -(-rows // num_experts))
    tiles = most_tiles(rows, num_experts, block)
    expert, begin, offsets, slot = table.split([tiles, tiles, num_experts + 1, rows])
    return RoutePlan(expert, begin, offsets, slot, block, top_k)


def _gated(
    x: Tensor,
    gate_up: TiledWeight,
    down: TiledWeight,
    act: Activation,
    plan: RoutePlan | None,
    weights_TK: Tensor | None,
) -> Tensor:
    """Gate, up and down on a GPU, for one matrix or a stack of experts."""
    method, configs = how_gated(x, gate_up, down, plan)
    if configs is None:
        return _scratch(x, gate_up, down, act, plan, weights_TK)
    first, second = configs
    if method == "decode":
        h = launch.decode_gate_up(x, gate_up, plan, act, config=first)
        return launch.decode_down(h, down, plan, weights_TK, config=second)
    h = launch.prefill_gate_up(x, gate_up, plan, act, config=first)
    return launch.prefill_down(h, down, plan, weights_TK, config=second)


def how_linear(rows: int, weight: TiledWeight) -> tuple[Method, LaunchConfig | None]:
    """Which kernel multiplies so many rows by one matrix, and how it is cut; None for scratch."""
    method = choose_method(rows, weight.kernel_bits)
    return method, None if method == "scratch" else choose_config(method, weight, rows)


def how_gated(
    x: Tensor, gate_up: TiledWeight, down: TiledWeight, plan: RoutePlan | None
) -> tuple[Method, tuple[LaunchConfig, LaunchConfig] | None]:
    """Which kernels run a gated MLP, and how its two products are cut; None for scratch."""
    rows = len(x) if plan is None else -(-len(plan.slot) // gate_up.shape[0])
    method = choose_method(rows, gate_up.kernel_bits)
    if method == "scratch":
        if plan is None or grouped_product(x, gate_up.shape[1] // 2):
            return method, None
        method = "prefill"
    first = choose_config(method, gate_up, rows, plan, whole=True)
    return method, (first, choose_config(method, down, rows, plan))


def grouped_product(x: Tensor, neurons: int) -> bool:
    """Whether torch's grouped product takes such activations without asking the host.

    Where it has no kernel (float16, ROCm, GPUs before sm_90) it copies the offsets to the host,
    which a CUDA graph forbids; rows must be multiples of 16 bytes.
    """
    if x.dtype != torch.bfloat16 or x.shape[1] % 8 or neurons % 8 or torch.version.hip is not None:
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)


def _scratch(
    x: Tensor,
    gate_up: TiledWeight,
    down: TiledWeight,
    act: Activation,
    plan: RoutePlan | None,
    weights_TK: Tensor | None,
) -> Tensor:
    """Decode to scratch and multiply as floats."""
    wide = launch.dequantize_rows(gate_up, x.dtype)
    if plan is None:
        h = _activate(torch.nn.functional.linear(x, wide[0]), act)
        return torch.nn.functional.linear(h, launch.dequantize_rows(down, x.dtype)[0])
    assert weights_TK is not None
    slot = plan.slot.long()
    ends = plan.offsets[1:]
    x_RD = x[slot // plan.top_k]
    h_RF = _activate(torch._grouped_mm(x_RD, wide.transpose(1, 2), offs=ends), act)
    del wide
    narrow = launch.dequantize_rows(down, x.dtype)
    y_RD = torch._grouped_mm(h_RF, narrow.transpose(1, 2), offs=ends)
    weight_R1 = weights_TK.reshape(-1)[slot, None]
    # Rows of no expert are undefined, so they are replaced, not multiplied by zero.
    y_RD = torch.where(weight_R1 != 0, y_RD * weight_R1, 0)
    slots_TKD = torch.empty_like(y_RD).index_copy_(0, slot, y_RD)
    return slots_TKD.view(len(x), plan.top_k, -1).float().sum(1).to(x.dtype)


def _reference(x: Tensor, gate_up_ND: Tensor, down_DF: Tensor, act: str) -> Tensor:
    """The gated MLP in float32."""
    return _activate(x.float() @ gate_up_ND.T, act) @ down_DF.T


def _activate(gate_up_TN: Tensor, act: str) -> Tensor:
    functional = torch.nn.functional
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    }
    gate, up = gate_up_TN.chunk(2, dim=-1)
    return functions[act](gate) * up
