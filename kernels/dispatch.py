"""Which implementation multiplies a nested weight on a device, why, and the way to call it.

The runtime modules of a model (`fissile.models.nested_fissile`, shipped with every artifact) ask
here when fissile is installed. Triton is imported by the launchers, when a kernel first runs.

Shapes: T tokens, K slots per token, N rows, E experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
from torch import Tensor

from fissile.kernels import columns
from fissile.kernels.configs import load_table, triton_version
from fissile.kernels.layout import LAYOUT_VERSION, WIDTHS
from fissile.kernels.ops import flatten, nested_experts, nested_linear, nested_mlp, plan_table
from fissile.kernels.tiles import TiledWeight, check_tile, stored_parts, tile

__all__ = [
    "ACTIVATIONS",
    "LAYOUT_VERSION",
    "experts",
    "linear",
    "mlp",
    "one_step",
    "refusal",
    "report",
    "stored",
    "tile",
]

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names of activations in transformers, and the kernels' own."""
_OLDEST = (8, 0)
_STEP: ContextVar[dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] | None] = ContextVar(
    "fissile_step", default=None
)
"""Plans of the running step by their route; the route's tensors are kept so that ids are theirs."""


@lru_cache
def refusal(
    device: str,
    dtype: torch.dtype,
    bits: int,
    group_size: int,
    companding: float = 1.0,
    *,
    ask_driver: bool = True,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the compiled kernels do not take such a product; None if they do.

    Args:
        device: type, "cuda" (which includes ROCm) or another.
        dtype: of the activations.
        bits: of the weight.
        group_size: of the weight.
        companding: of the weight.
        ask_driver: look at the GPU too, which initialises it.
        capability: of the GPU, where it is known without.
    """
    if device != "cuda":
        return f"no kernels for device {device}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    asked = capability is None and ask_driver and torch.version.hip is None
    if asked and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    if capability is not None and capability < _OLDEST:
        major, minor = capability
        return f"the GPU has compute capability {major}.{minor}, the kernels need 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"activations are {dtype}, the kernels take float16 and bfloat16"
    try:
        check_tile(bits, group_size, companding)
    except ValueError as err:
        return str(err)
    return None


def linear(x: Tensor, weight: TiledWeight, bias: Tensor | None) -> Tensor:
    """x W^T (+ bias), (..., N).

    Args:
        x: (..., K), float16 or bfloat16.
        weight: one matrix.
        bias: (N,).
    """
    y = nested_linear(x.reshape(-1, x.shape[-1]), *flatten(weight), bias)
    return y.view(*x.shape[:-1], y.shape[-1])


def mlp(x: Tensor, gate_up: TiledWeight, down: TiledWeight, activation: str) -> Tensor:
    """down(act(gate(x)) * up(x)), of the shape of x.

    Args:
        x: (..., D), float16 or bfloat16.
        gate_up: paired.
        down: the down projection.
        activation: a key of `ACTIVATIONS`.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = nested_mlp(rows, *flatten(gate_up), *flatten(down), ACTIVATIONS[activation])
    return y.view(x.shape)


def experts(
    x_TD: Tensor,
    route: tuple[Tensor, Tensor],
    gate_up: TiledWeight,
    down: TiledWeight,
    activation: str,
) -> Tensor:
    """Sum over a token's experts of weight times output, (T, D).

    All tokens of a step meet an expert at one width; widths per token are not served. They would be
    sound (the codes of fewer bits are in those of more) but cost more than they save, see the page
    on kernels of the documentation. Experts may have widths of their own instead.

    Args:
        x_TD: float16 or bfloat16.
        route: chosen experts (T, K) and their weights (T, K).
        gate_up: paired stack.
        down: stack of down projections.
        activation: a key of `ACTIVATIONS`.
    """
    index_TK, weights_TK = route
    count, bits = gate_up.shape[0], gate_up.kernel_bits
    plan, step = None, None if torch.compiler.is_compiling() else _STEP.get()
    key = (id(index_TK), id(weights_TK), count, bits)
    if step is not None and key in step:
        plan = step[key][0]
    if plan is None:
        plan = plan_table(index_TK, weights_TK, count, bits)
        if step is not None:
            step[key] = plan, index_TK, weights_TK
    return nested_experts(
        x_TD,
        weights_TK,
        plan,
        *flatten(gate_up),
        *flatten(down),
        ACTIVATIONS[activation],
    )


@contextmanager
def one_step() -> Iterator[None]:
    """Within it, layers that follow the very same route share the sorted order of tokens."""
    token = _STEP.set({})
    try:
        yield
    finally:
        _STEP.reset(token)


def report(
    gpu: str | None, group_size: int = 64, capability: tuple[int, int] | None = None
) -> dict[str, str]:
    """What would run, and why, by width; no device is initialised.

    Args:
        gpu: name of the GPU that models are to run on; None for the CPU.
        group_size: of the weights.
        capability: of the GPU; None where it is not known, which is said.
    """
    table = load_table(gpu, triton_version())
    timed = f"measured {table.measured}" if table.measured else "never timed"
    found = {}
    for bits in WIDTHS:
        if gpu is None:
            missing = columns.unavailable()
            path, why = (
                ("columns", "packed codes, in float32") if missing is None else ("decoded", missing)
            )
        else:
            refused = refusal(
                "cuda", torch.bfloat16, bits, group_size, ask_driver=False, capability=capability
            )
            path, why = "triton", f"triton {triton_version()}, launch table {table.name}, {timed}"
            if capability is None and torch.version.hip is None:
                why += "; if its compute capability, which was not read, is 8.0 at least"
            if bits == 6:
                why += "; held as 8 bits"
            if refused is not None:
                path, why = "decoded", refused
        found[f"{bits} bits"] = f"{path} ({why})"
    if gpu is not None:
        found["rows of an expert"] = (
            f"decode kernels up to {table.decode_rows}, decoded to scratch for cuBLAS "
            f"from {table.scratch_rows}, prefill kernels between"
        )
    return found


def stored(form: TiledWeight) -> Mapping[str, Tensor]:
    """The stored parts of a weight in the kernels' order."""
    return stored_parts(form)
