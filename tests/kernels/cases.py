"""Weights, activations and routes of the proofs in the interpreter, and their float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fissile.kernels import layout

BF16, FP16 = torch.bfloat16, torch.float16
ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
}
# Relative error of what is left before the result is rounded, and with weights rounded first.
EXACT, ROUNDED = 2e-5, 4e-3


def random_parts(shape: tuple[int, int, int], group_size: int, seed: int = 0) -> dict[str, Tensor]:
    """A stored weight whose zeros centre the codes, as a quantizer leaves them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (2, *shape), generator=generator, dtype=torch.uint8)
    parts = layout.pack(codes[0]) | layout.pack_residual(codes[1])
    for bits in layout.WIDTHS:
        levels = 1 << min(bits, 4)
        groups = (*shape[:-1], shape[-1] // group_size)
        scale = (torch.rand(groups, generator=generator) + 0.5) / levels / (16 if bits > 4 else 1)
        zero = -scale * (levels - 1) / 2 + 0.05 * torch.randn(groups, generator=generator)
        parts[f"theta_{bits}"] = layout.encode_theta(scale, zero)
    return parts


def tokens(count: int, width: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Activations with a mean and a few outliers, which offsets would betray."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator) + 0.3
    x[:, :: max(width // 4, 1)] *= 8
    return x.to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


WIDTHS = (2, 3, 4, 8)  # each has its own code; 6 bits run that of 8


def routed(kind: str) -> SimpleNamespace:
    """Experts and 13 tokens: some experts empty, some slots of weight zero, or all on one."""
    experts, width, neurons, count, top_k = 3, 160, 96, 13, 2
    generator = torch.Generator().manual_seed(2)
    first = torch.randint(0, 2, (count,), generator=generator) * 2
    index = torch.stack([first, 2 - first], 1)
    weights = torch.rand(count, top_k, generator=generator) + 0.1
    weights[2], weights[5, 1] = 0, 0
    if kind == "hot":
        index, weights = torch.full((count, 1), 1), weights[:, :1]
    return SimpleNamespace(
        x=tokens(count, width, BF16),
        index=index,
        weights=weights,
        experts=experts,
        gate_up=random_parts((experts, 2 * neurons, width), 32, seed=3),
        down=random_parts((experts, width, neurons), 32, seed=4),
        add=tokens(count, width, BF16, seed=5),
    )


def expected(case: SimpleNamespace, bits: int, act: str) -> Tensor:
    gate_up = layout.dequantize(case.gate_up, bits).double()
    down = layout.dequantize(case.down, bits).double()
    out = case.add.double()
    for t, k in torch.nonzero(case.weights).tolist():
        e = int(case.index[t, k])
        gate, up = (gate_up[e] @ case.x[t].double()).chunk(2)
        out[t] += case.weights[t, k].double() * (down[e] @ (ACT[act](gate) * up))
    return out
