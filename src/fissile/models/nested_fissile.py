"""Bit-nested weights at run time: how they are held in memory, and which code multiplies by them.

Weights arrive as the stored parts of one width. The first product turns them into what the device
reads fastest, and the parts are dropped, so that a model at k bits takes about k bits a weight:

    columns   CPU: `fissile.kernels.columns`, in float32; few tokens straight from the codes
    triton    GPU: the compiled kernels of the fissile package, where it is installed
    decoded   anything else: the weight is decoded for every product

`NestedTensor.path` says which one runs and why. The stored parts come back for whoever asks for
them: `state_dict`, or a move to another device. Floats that are tied to those of a wider width stay
beside what took the place of the planes: rounded, they cannot be told from it.

This file is copied into every artifact and must work there without the fissile package. Rules that
serving engines impose are marked "engine:".

Shapes: E experts, N output rows, K inputs, R rows of activations, F neurons, D model width.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fissile.kernels.columns import (
    FEW_ROWS,
    Columns,
    from_columns,
    multiply,
    multiply_decoded,
    to_columns,
    unavailable,
)
from fissile.kernels.layout import (
    LAYOUT_VERSION,
    dequantize,
    part_dtype,
    part_shape,
    segment_names,
)
from fissile.models.configuration_fissile import FissileConfig

Path = Literal["columns", "triton", "decoded"]
_CHANGE = threading.RLock()  # two threads may use a model for the first time at once
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Held:
    """What took the place of stored parts.

    Attributes:
        form: `Columns`, or the kernels' own.
        members: the weights it holds, one above the other.
        stored: `form` back to the parts of all members' rows.
    """

    form: Any
    members: tuple[NestedTensor, ...]
    stored: Callable[[Any], dict[str, Tensor]]

    def release(self) -> None:
        """Give every member its stored parts back."""
        parts, begin = self.stored(self.form), 0
        for member in self.members:
            rows, own = member.shape[-2], member.staying()
            for name in member.segments:
                if name in own:
                    continue
                part = parts[name].narrow(-3 if name.startswith("theta") else -2, begin, rows)
                own[name] = part.reshape(part_shape(name, member.shape, member.group_size)).clone()
            member.keep(own)
            begin += rows


class NestedTensor(nn.Module):
    """One weight (N, K) or a stack (E, N, K), held as buffers.

    engine: serving engines re-allocate parameters in the model's dtype, so packed data are buffers.

    Args:
        config: of the model.
        name: of the weight, in the checkpoint.
        shape: of what is held.
        bits: the width; default the configuration's.
    """

    def __init__(
        self, config: FissileConfig, name: str, shape: tuple[int, ...], bits: int | None = None
    ) -> None:
        super().__init__()
        nested, widths = config.nested, config.widths_of(name) if bits is None else bits
        assert nested is not None
        if isinstance(widths, list):
            raise ValueError(f"nested.mixed of {name}: a width for each expert of what is no stack")
        bits = widths
        self.group_size = nested.get("groups", {}).get(name, nested["group_size"])
        self.bits, self.shape = bits, shape
        self.companding = nested.get("companding", {}).get(name, 1.0)
        self.segments = segment_names(bits, nested["widths"], bool(nested.get("tied")))
        self.held: Held | None = None
        self.register_segments()

    def register_segments(self) -> None:
        """A buffer of zeros for every stored part."""
        for segment in self.segments:
            size = part_shape(segment, self.shape, self.group_size)
            self.register_buffer(segment, torch.zeros(size, dtype=part_dtype(segment)))

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        owner = self if self.held is None else self.held.members[0]
        return next(owner.buffers()).device

    def alike(self, other: NestedTensor) -> bool:
        """Whether the rows of both could be one weight."""
        own = (self.bits, self.group_size, self.companding)
        return own == (other.bits, other.group_size, other.companding)

    def parts(self) -> dict[str, Tensor]:
        """The stored parts of the served width, in file order."""
        self.release()
        return {name: getattr(self, name) for name in self.segments}

    def staying(self) -> dict[str, Tensor]:
        """Floats that this width is tied to, and how: they cannot be had back from what is held."""
        if f"tied_{self.bits}" not in self.segments:
            return {}
        return {n: getattr(self, n) for n in self.segments if not n.startswith("plane")}

    def path(self, x: Tensor | None = None) -> tuple[Path, str]:
        """Which code multiplies by this weight, and why.

        Args:
            x: activations; default float activations of the kind the code is made for.
        """
        if self.device.type == "cpu":
            if (missing := unavailable()) is not None:
                return "decoded", missing
            if x is not None and not _plain(x):
                return "decoded", "gradients or float64 are asked for"
            return "columns", "packed codes on the CPU"
        module, why = compiled_kernels()
        if module is None:
            return "decoded", why
        dtype = torch.bfloat16 if x is None else x.dtype
        if x is not None and torch.is_grad_enabled() and x.requires_grad:
            return "decoded", "gradients are asked for"
        refusal = module.refusal(
            self.device.type, dtype, self.bits, self.group_size, self.companding
        )
        return ("triton", "compiled kernels") if refusal is None else ("decoded", refusal)

    def keep(self, parts: dict[str, Tensor]) -> None:
        """Hold stored parts, and nothing else."""
        for name in [name for name in self._buffers if name not in self.segments]:
            delattr(self, name)
        for name in self.segments:
            self._buffers[name] = parts[name]
        self.held = None

    def release(self) -> None:
        """Return to the stored parts."""
        with _CHANGE, torch.inference_mode(False), torch.no_grad():
            if self.held is not None:
                self.held.release()

    def columns(self) -> Columns | None:
        """The weight as columns; None on another device, or while a compiler looks on."""
        if self.held is None and not torch.compiler.is_compiling():
            with _CHANGE, torch.inference_mode(False), torch.no_grad():
                if self.held is None and self.device.type == "cpu" and unavailable() is None:
                    form = to_columns(self.parts(), self.bits, self.companding)
                    hold([self], form, from_columns)
        found = None if self.held is None else self.held.form
        return found if isinstance(found, Columns) else None

    def product(self, x: Tensor, expert: int | None = None) -> Tensor:
        """Return x W^T, (..., N), in the dtype of x.

        Args:
            x: (..., K).
            expert: which matrix of a stack.
        """
        columns = self.columns()
        if columns is None:
            return nn.functional.linear(x, self.dense(x.dtype, expert))
        x_RK = x.reshape(-1, x.shape[-1])
        if len(x_RK) <= FEW_ROWS and _plain(x):
            which = None if expert is None else torch.full((len(x_RK),), expert)
            y_RN = multiply(x_RK, columns, which)
            if x.dtype is not torch.float32:
                y_RN = y_RN.to(x.dtype)
        else:
            y_RN = multiply_decoded(x_RK, columns, expert or 0)
        return y_RN.view(*x.shape[:-1], y_RN.shape[-1])

    def products(self, x_RK: Tensor, experts_R: Tensor) -> Tensor:
        """Rows of x times matrices of the stack, (R, N), where `few_products` allows it.

        Args:
            x_RK: activations.
            experts_R: which matrix each row meets, int64.
        """
        columns = self.columns()
        assert columns is not None
        return multiply(x_RK, columns, experts_R).to(x_RK.dtype)

    def dense(self, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Decode to (..., N, K) in `dtype`; `index` picks one matrix of a stack."""
        parts = self.parts()
        if index is not None:
            parts = {name: part[index] for name, part in parts.items()}
        return dequantize(parts, self.bits, self.companding).to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> NestedTensor:
        self.release()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.release()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args)


class NestedLinear(nn.Module):
    """A linear layer on a nested weight."""

    def __init__(self, config: FissileConfig, name: str, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = NestedTensor(config, name, (linear.out_features, linear.in_features))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (kernels := kernels_for([weight], x)) is not None:
            return kernels.linear(x, held_by_kernels(kernels, [weight]), self.bias)
        y = weight.product(x)
        return y if self.bias is None else y + self.bias


def hold(
    members: Sequence[NestedTensor], form: Any, stored: Callable[[Any], dict[str, Tensor]]
) -> None:
    """Put `form` in the place of the members' stored parts; its tensors count with the first."""
    held = Held(form, tuple(members), stored)
    for name, tensor in form.tensors().items():
        members[0].register_buffer(f"held_{name}", tensor, persistent=False)
    for member in members:
        member.held = held  # before the parts go: another thread may be looking
        staying = member.staying()
        for name in member.segments:
            if name not in staying:
                member._buffers[name] = None


def kernels_for(
    weights: Sequence[NestedTensor],
    x: Tensor,
    activation: str = "silu",
    gates: Tensor | None = None,
) -> Any:
    """The compiled kernels if they multiply `x` by these weights, else None.

    Args:
        weights: of one layer.
        x: activations.
        activation: between gate and up, where there is one.
        gates: weights of chosen experts; the kernels have no gradients for those of a trained
            router.
    """
    if gates is not None and gates.requires_grad and torch.is_grad_enabled():
        return None
    if x.is_cpu or any(weight.path(x)[0] != "triton" for weight in weights):
        return None
    kernels = compiled_kernels()[0]
    return kernels if activation in kernels.ACTIVATIONS else None


def few_products(
    weights: Sequence[NestedTensor], experts: int, x_TD: Tensor, index_TK: Tensor
) -> bool:
    """Whether a step has so few tokens that its experts are best multiplied all at once."""
    few = index_TK.numel() <= FEW_ROWS * experts and _plain(x_TD)
    return few and all(weight.columns() is not None for weight in weights)


def held_by_kernels(kernels: Any, members: Sequence[NestedTensor], paired: bool = False) -> Any:
    """The form in which compiled kernels read the members, one above the other.

    Args:
        kernels: from `kernels_for`.
        members: weights of one width and group size.
        paired: the upper half of the rows are gates of the lower.

    Raises:
        RuntimeError: a CUDA graph is being captured and the weights were not used before.
    """
    held = members[0].held
    if held is not None and held.members == tuple(members):
        return held.form
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("use the model once before its steps are captured in a CUDA graph")
    with _CHANGE, torch.inference_mode(False), torch.no_grad():
        parts = [member.parts() for member in members]
        whole = {
            name: torch.cat([p[name] for p in parts], -3 if name.startswith("theta") else -2)
            for name in parts[0]
        }
        first = members[0]
        form = kernels.tile(whole, first.bits, paired=paired, companding=first.companding)
        hold(members, form, kernels.stored)
    return form


def one_step(x: Tensor) -> AbstractContextManager[None]:
    """Within it, layers that follow the very same route share what is worked out from it."""
    if x.is_cpu or torch.compiler.is_compiling():
        return nullcontext()
    kernels = compiled_kernels()[0]
    return nullcontext() if kernels is None else kernels.one_step()


@lru_cache
def compiled_kernels() -> tuple[Any, str]:
    """The kernels of the fissile package, or None and why not."""
    module: Any = None
    try:
        module = importlib.import_module("fissile.kernels.dispatch")
    except ImportError as err:
        why = f"fissile's kernels cannot be imported: {err}"
    else:
        why = "fissile is installed"
        if LAYOUT_VERSION != module.LAYOUT_VERSION:
            why = f"this model has layout {LAYOUT_VERSION}, fissile {module.LAYOUT_VERSION}"
            module = None
    if module is None:
        _LOG.warning("nested weights are decoded for every product: %s", why)
    return module, why


def paths(model: nn.Module) -> dict[str, int]:
    """Which code multiplies by the nested weights of `model`: "path: reason" to how many."""
    found: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, NestedTensor):
            key = ": ".join(module.path())
            found[key] = found.get(key, 0) + 1
    return found


def _plain(x: Tensor) -> bool:
    """Whether float32 sums without gradients are what `x` asks for."""
    return x.dtype != torch.float64 and not (torch.is_grad_enabled() and x.requires_grad)
