"""What each weight of a block costs at each width, measured at the block's output.

Only one weight is quantized at a time; the error of the output, relative to the stream it joins, is
a unit that adds up over the blocks of a model. Weights that share an input share a width, so that
they can be multiplied as one.

Shapes: N windows, S tokens per window, D model width; K groups of weights, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from fissile.kernels import layout
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.quant.allocate import Choice
from fissile.quant.streams import Streams

_TOKENS = 8192
"""Calibration tokens of the measurement, at most but for one window."""


def sharing(names: Sequence[str], attention: Sequence[Sequence[str]]) -> list[list[str]]:
    """Weights of a layer in groups with a common input, in alphabetical order.

    Args:
        names: of the weights, relative to the layer, in any order.
        attention: attention projections by shared input, as in the model's configuration.
    """
    inputs = {f"self_attn.{name}.weight": f"self_attn.{g[0]}" for g in attention for name in g}
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        key = inputs.get(name, name.replace(".up_proj.", ".gate_proj."))
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
        First name of each group to width to error.
    """
    count, tokens = min(streams.shape[0], -(-_TOKENS // streams.shape[1])), streams.shape[1]
    table_KW = torch.zeros(len(groups), len(widths), dtype=torch.float64)
    for x_BSD, route in streams.first(count, layer_idx):
        inputs = (x_BSD, route, streams.context(x_BSD))
        target_BSD = reference(*inputs)
        size_BS = target_BSD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        for k, group in enumerate(groups):
            for w, bits in enumerate(widths):
                state = {name: decode(name, bits) for name in group}
                error_BSD = functional_call(reference, state, inputs) - target_BSD
                table_KW[k, w] += (error_BSD.square().sum(-1) / size_BS).double().sum()
    streams.workers.sum_([table_KW])
    rows = (table_KW / (count * tokens)).tolist()
    return {g[0]: dict(zip(widths, row, strict=True)) for g, row in zip(groups, rows, strict=True)}


def choices(
    errors: Mapping[int, float],
    shapes: Sequence[Sequence[int]],
    group_size: int,
    tied: bool = False,
) -> list[Choice]:
    """Widths of weights that share one, with their bytes.

    Args:
        errors: width to what it costs.
        shapes: of the weights.
        group_size: inputs that share a scale and a zero.
        tied: whether narrower widths' floats are tied to those of the widest.
    """
    found, kept = [], (tuple(errors), tied)
    for bits, error in errors.items():
        size = sum(layout.loaded_bytes(shape, group_size, bits, *kept) for shape in shapes)
        found.append(Choice(bits, size, error))
    return found
