"""What each weight of a block costs at each width, measured at the block's output.

Only one weight is quantized at a time; the error of the output, relative to the stream it joins, is
a unit that adds up over the blocks of a model. Weights that share an input share a width, so that
they can be multiplied as one. Of a stack every expert has a width of its own, which is that of its
gate and up rows and of its down projection: an expert is read, kept and multiplied as a whole.

Shapes: N windows, B windows of a batch, S tokens per window, T = B*S, D model width, F slots of a
token, R tokens of one expert; K groups of weights, E experts, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fissile.kernels import layout
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.modules_fissile import FissileExperts, run_experts
from fissile.models.routers_fissile import Route
from fissile.quant.allocate import Choice
from fissile.quant.streams import Streams

EXPERTS = "mlp.experts."
"""How names of stacks begin."""
_TOKENS = 8192
"""Calibration tokens of the measurement, at most but for one window."""


def sharing(names: Sequence[str], attention: Sequence[Sequence[str]]) -> list[list[str]]:
    """Weights of a layer in groups that share a width, in alphabetical order.

    Weights with a common input are one, and so are the two stacks of the experts.

    Args:
        names: of the weights, relative to the layer, in any order.
        attention: attention projections by shared input, as in the model's configuration.
    """
    inputs = {f"self_attn.{name}.weight": f"self_attn.{g[0]}" for g in attention for name in g}
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        key = inputs.get(name, name.replace(".up_proj.", ".gate_proj."))
        key = EXPERTS if name.startswith(EXPERTS) else key
        groups.setdefault(key, []).append(name)
    return list(groups.values())


@torch.no_grad()
def sensitivity(
    reference: FissileDecoderLayer,
    groups: Sequence[Sequence[str]],
    widths: Sequence[int],
    decode: Callable[[str, int], Tensor],
    streams: Streams,
    layer_idx: int,
) -> dict[str, dict[int, float]]:
    """Relative squared error of a block's output with one group of weights quantized.

    Args:
        reference: float layer.
        groups: names that share a width; the first names the group.
        widths: to measure.
        decode: name and width to the quantized weight.
        streams: with the float model's stream.
        layer_idx: index of the layer.

    Returns:
        First name of each group to width to error; for stacks, with one expert quantized at a time,
        `expert_name` of every expert to width to error.
    """
    count, tokens = min(streams.shape[0], -(-_TOKENS // streams.shape[1])), streams.shape[1]
    plain = [group for group in groups if not group[0].startswith(EXPERTS)]
    stacks = [group for group in groups if group[0].startswith(EXPERTS)]
    experts = reference.mlp.num_experts if stacks else 0
    table_KW = torch.zeros(len(plain), len(widths), dtype=torch.float64)
    table_EW = torch.zeros(experts, len(widths), dtype=torch.float64)
    for x_BSD, route in streams.first(count, layer_idx):
        inputs = (x_BSD, route, streams.context(x_BSD))
        target_BSD = reference(*inputs)
        size_BS = target_BSD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        for w, bits in enumerate(widths):
            for k, group in enumerate(plain):
                state = {name: decode(name, bits) for name in group}
                error_BSD = functional_call(reference, state, inputs) - target_BSD
                table_KW[k, w] += (error_BSD.square().sum(-1) / size_BS).double().sum()
            for group in stacks:
                state = {name.removeprefix(EXPERTS): decode(name, bits) for name in group}
                table_EW[:, w] += _expert_errors(reference, state, inputs, size_BS.flatten())
    table = torch.cat([table_KW, table_EW])
    streams.workers.sum_([table])
    found: dict[str, dict[int, float]] = {}
    names = [group[0] for group in plain]
    names += [expert_name(group[0], e) for group in stacks for e in range(experts)]
    for name, row in zip(names, table.tolist(), strict=True):
        found[name] = {k: sum_ / (count * tokens) for k, sum_ in zip(widths, row, strict=True)}
    return found


def expert_name(stack: str, expert: int) -> str:
    """How one expert of a stack is called in tables of sensitivities and choices."""
    return f"{stack}.{expert}"


def _expert_errors(
    reference: FissileDecoderLayer,
    stacks: Mapping[str, Tensor],
    inputs: tuple[Tensor, Route | None, dict[str, Any]],
    size_T: Tensor,
) -> Tensor:
    """Sums over tokens of the relative squared error with one expert quantized, float64 (E,).

    Only the tokens that chose an expert feel it, and of the block only what its output goes through
    alone: the sum with the other experts, the norm behind the MLP, if any, and the residual stream.
    All of that acts on every token by itself, so nothing else is computed again, and nothing is
    approximated.

    Args:
        reference: float layer.
        stacks: quantized "gate_up_proj" and "down_proj"; one that is absent stays as it is.
        inputs: stream, route and context.
        size_T: squared norm of the layer's output.
    """
    x_BSD, route, context = inputs
    mlp, experts = reference.mlp, reference.mlp.experts
    assert isinstance(experts, FissileExperts)
    residual_BSD = reference.attend(x_BSD, context)
    mlp_BSD = reference.mlp_input(residual_BSD)
    residual_TD, x_TD = residual_BSD.flatten(0, 1), mlp_BSD.flatten(0, 1)
    y_TD, route = mlp(mlp_BSD, route).flatten(0, 1), mlp.decide(x_TD, route)
    assert route is not None
    index_TF, weights_TF = route
    floats: dict[str, Tensor] = dict(experts.named_parameters())

    def output(state: Mapping[str, Tensor], rows: Tensor, weights_RF: Tensor) -> Tensor:
        gate_up, down = state["gate_up_proj"], state["down_proj"]
        one = (x_TD[rows], index_TF[rows], weights_RF)
        return run_experts(lambda e: (gate_up[e], down[e]), experts.act_fn, *one)

    sums_E = torch.zeros(mlp.num_experts, dtype=torch.float64)
    for expert in range(mlp.num_experts):
        own_TF = weights_TF * (index_TF == expert)
        rows = torch.where((own_TF != 0).any(-1))[0]
        own_RF = own_TF[rows]
        change_RD = output({**floats, **stacks}, rows, own_RF) - output(floats, rows, own_RF)
        before_RD = reference.combine(residual_TD[rows], y_TD[rows])
        error_RD = reference.combine(residual_TD[rows], y_TD[rows] + change_RD) - before_RD
        sums_E[expert] = (error_RD.square().sum(-1) / size_T[rows]).double().sum()
    return sums_E


def choices(
    errors: Mapping[int, float], weights: Sequence[tuple[Sequence[int], int]]
) -> list[Choice]:
    """Widths of weights that share one, with their bytes.

    Args:
        errors: width to what it costs.
        weights: shape of each, and its inputs that share a scale and a zero.
    """
    found = []
    for bits, error in errors.items():
        size = sum(layout.loaded_bytes(shape, group, bits) for shape, group in weights)
        found.append(Choice(bits, size, error))
    return found
