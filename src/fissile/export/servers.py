"""Dense models as integers in the formats of servers: compressed-tensors int4, GPTQ 4 and 8 bits.

Layers are solved one after the other on the quantized path, so that later ones see the errors of
earlier ones. Shapes: N windows, S tokens, O output rows, I inputs, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.stream import StreamedModel, batches
from fissile.quant.hessian import HessianAccumulator
from fissile.quant.integer_zeros import IntegerWeight, solve_integer_zeros

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that share an input."""


@dataclass(frozen=True)
class Format:
    """A format and what it holds.

    Args:
        method: `quant_method` in config.json.
        bits: widths that servers have kernels for.
        symmetric: the zero is fixed.
        scale: dtype of scales.
    """

    method: str
    bits: tuple[int, ...]
    symmetric: bool
    scale: torch.dtype


FORMATS: Mapping[str, Format] = {
    "compressed-tensors": Format("compressed-tensors", (4,), False, torch.bfloat16),
    "gptq": Format("gptq", (4, 8), True, torch.float16),
}


@torch.no_grad()
def quantize_for_server(
    model: StreamedModel,
    ids_NS: Tensor,
    wanted: Format,
    *,
    bits: int,
    group_size: int,
    batch_tokens: int,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> Iterator[tuple[dict[str, IntegerWeight], dict[str, float]]]:
    """Yield the linears of every layer and their relative losses, tr(dW H dW') / tr(W H W').

    Args:
        model: a dense model with float weights.
        ids_NS: int64 calibration windows.
        wanted: the format.
        bits: width, one of the format's.
        group_size: inputs that share a scale; divides every width.
        batch_tokens: tokens of a forward pass.
        progress: called as (stage, done, total, detail).
    """
    hidden_NSD = model.embed(ids_NS)
    parts = list(batches(ids_NS, batch_tokens))
    for i in range(model.num_layers):
        layer = model.layer(i)
        hessians = _hessians(model, layer, hidden_NSD, parts)
        found: dict[str, IntegerWeight] = {}
        losses: dict[str, float] = {}
        for group in GROUPS:
            for name in group:
                linear, hessian = _linears(layer)[name], hessians[group[0]]
                weight = solve_integer_zeros(
                    linear.weight,
                    hessian,
                    bits=bits,
                    group_size=group_size,
                    symmetric=wanted.symmetric,
                    scale_dtype=wanted.scale,
                )
                total = float(((linear.weight @ hessian) * linear.weight).sum())
                losses[name] = float(weight.loss.double().sum()) / max(total, 1e-30)
                found[name] = weight
                linear.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
        for part in parts:
            hidden = hidden_NSD[part]
            hidden_NSD[part] = layer(hidden, None, model.context(hidden))
        if progress is not None:
            mean = sum(losses.values()) / len(losses)
            progress("export", i + 1, model.num_layers, f"relative loss {mean:.2e}")
        yield found, losses


def _linears(layer: FissileDecoderLayer) -> dict[str, nn.Linear]:
    attention, shared = layer.self_attn, layer.mlp.shared
    assert shared is not None
    return {
        name: getattr(attention if name[0] in "qkvo" else shared, name)
        for group in GROUPS
        for name in group
    }


def _hessians(
    model: StreamedModel, layer: FissileDecoderLayer, hidden_NSD: Tensor, parts: list[slice]
) -> dict[str, Tensor]:
    """Mean of x x^T at the first linear of every group, in one pass over the windows."""
    linears = _linears(layer)
    sums = {group[0]: HessianAccumulator(linears[group[0]].in_features) for group in GROUPS}
    with ExitStack() as stack:
        for name, hessian in sums.items():
            stack.callback(linears[name].register_forward_pre_hook(_feed(hessian)).remove)
        for part in parts:
            hidden = hidden_NSD[part]
            layer(hidden, None, model.context(hidden))
    return {name: hessian.finish()[0] for name, hessian in sums.items()}


def _feed(hessian: HessianAccumulator) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _module, args: hessian.add(args[0])


# -- packing -------------------------------------------------------------------------------------


def pack_int32(values_RC: Tensor, bits: int) -> Tensor:
    """Put 32 / bits values of a row into each int32, the first in the lowest bits.

    Args:
        values_RC: integers (R, C) below 2^bits; C is a multiple of 32 / bits.
        bits: 4 or 8.

    Returns:
        int32 (R, C * bits / 32).
    """
    lanes = values_RC.to(torch.int64).unflatten(1, (-1, 32 // bits))
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    words = (lanes << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def compressed_tensors(name: str, weight: IntegerWeight) -> dict[str, Tensor]:
    """Tensors of the format "pack-quantized", asymmetric: zeros are packed along the rows."""
    return {
        f"{name}.weight_packed": pack_int32(weight.codes, weight.bits),
        f"{name}.weight_scale": weight.scale.to(torch.bfloat16),
        f"{name}.weight_zero_point": pack_int32(
            weight.zero.T.contiguous(), weight.bits
        ).T.contiguous(),
        f"{name}.weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int64),
    }


def gptq_tensors(name: str, weight: IntegerWeight) -> dict[str, Tensor]:
    """Tensors of GPTQ checkpoints: codes packed along the inputs, zeros stored less one."""
    inputs = weight.codes.shape[1]
    zeros = weight.zero.T.contiguous() - 1
    return {
        f"{name}.qweight": pack_int32(weight.codes, weight.bits).T.contiguous(),
        f"{name}.qzeros": pack_int32(zeros, weight.bits),
        f"{name}.scales": weight.scale.T.to(torch.float16).contiguous(),
        f"{name}.g_idx": torch.arange(inputs, dtype=torch.int32) // weight.group_size,
    }


def quantization_config(method: str, bits: int, group_size: int) -> dict[str, Any]:
    """The entry of config.json that tells servers how to read the tensors."""
    if method == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
