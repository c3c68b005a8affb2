"""A stack of experts whose widths differ: what an allocation of bits gives each expert.

Files keep whole parts, (E, ...), and so do the names and shapes that loaders and state dicts see.
In memory the experts of one width lie together, with that width's parts and no others; what nobody
is served with is dropped when it is loaded, and comes back as zeros.

This file is copied into every artifact and must work there without the fissile package.

Shapes: E experts, N output rows, K inputs, R rows of activations, T tokens, K' slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fissile.kernels.layout import experts_by_width, part_shape, stack_names
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.nested_fissile import NestedTensor

_MEMBERS = "stacks"
_Tensor = TypeVar("_Tensor", bound=NestedTensor)


class NestedStack(nn.Module):
    """A stack (E, N, K) with a width for every expert.

    Attributes:
        shape: (E, N, K).
        bits_E: width of every expert.
        members: the experts of each of `stacks`.
        stacks: a `NestedTensor` for each width, ascending.
        segments: the stored parts that are needed, in file order.

    Args:
        config: of the model.
        name: in the checkpoint.
        shape: (E, N, K).
        bits_E: width of every expert.
    """

    def __init__(
        self, config: FissileConfig, name: str, shape: tuple[int, ...], bits_E: Sequence[int]
    ) -> None:
        super().__init__()
        assert config.nested is not None
        by_width = experts_by_width(bits_E)
        self.shape, self.bits_E, self.members = shape, tuple(bits_E), tuple(by_width.values())
        self.stacks = nn.ModuleList(
            NestedTensor(config, name, (len(experts), *shape[1:]), bits)
            for bits, experts in by_width.items()
        )
        places = sorted((e, i, n) for i, own in enumerate(self.members) for n, e in enumerate(own))
        self._places = tuple((stack, index) for _, stack, index in places)
        self._maps: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self.segments = stack_names(bits_E, config.nested["widths"])

    def product(self, x: Tensor, expert: int) -> Tensor:
        """Return x W^T of one expert, (..., N), in the dtype of x."""
        stack, index = self._places[expert]
        return self._tensor(stack).product(x, index)

    def products(self, x_RK: Tensor, experts_R: Tensor) -> Tensor:
        """Rows of x times matrices of the stack, (R, N), where `few_products` allows it.

        Args:
            x_RK: activations.
            experts_R: which matrix each row meets, int64.
        """
        y_RN = x_RK.new_empty(len(x_RK), self.shape[-2])
        stack_E, index_E = self.maps(x_RK.device)
        for i, tensor in enumerate(tensors_of(self)):
            rows = torch.where(stack_E[experts_R] == i)[0]
            if len(rows):
                y_RN[rows] = tensor.products(x_RK[rows], index_E[experts_R[rows]])
        return y_RN

    def dense(self, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """Decode to (..., N, K) in `dtype`; `index` picks one expert."""
        if index is not None:
            stack, place = self._places[index]
            return self._tensor(stack).dense(dtype, place)
        tensors = tensors_of(self)
        whole = torch.empty(self.shape, dtype=dtype, device=tensors[0].device)
        for tensor, experts in zip(tensors, self.members, strict=True):
            whole[experts] = tensor.dense(dtype)
        return whole

    def maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of every expert, int64 (E,): which of `stacks` it is in, and its index there."""
        if device not in self._maps:
            with torch.inference_mode(False):
                stack_E, index_E = torch.tensor(self._places, device=device).unbind(1)
            self._maps[device] = stack_E, index_E
        return self._maps[device]

    def replace(self, make: Callable[..., _Tensor]) -> list[_Tensor]:
        """Hold other tensors: `make(tensor, experts=…)` for each of the present ones."""
        pairs = zip(tensors_of(self), self.members, strict=True)
        made = [make(tensor, experts=experts) for tensor, experts in pairs]
        self.stacks = nn.ModuleList(made)
        self.shape = (self.shape[0], *made[0].shape[1:])
        return made

    def _tensor(self, stack: int) -> NestedTensor:
        tensor = self.stacks[stack]
        assert isinstance(tensor, NestedTensor)
        return tensor

    # -- one weight for whoever loads and saves -----------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("segments", ()):
            return self._whole(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("segments", ()):
            self._keep(name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(  # type: ignore[override]
        self,
        *,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> dict[str, Any]:
        """Whole parts, as they are stored."""
        destination = {} if destination is None else destination
        for name in self.segments:
            destination[prefix + name] = self._whole(name)
        return destination

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.segments:
            # The stacks take it from here, and say so where it is missing.
            if (whole := state_dict.pop(prefix + name, None)) is not None:
                for i, tensor in enumerate(tensors_of(self)):
                    if name in tensor.segments:
                        key = f"{prefix}{_MEMBERS}.{i}.{name}"
                        state_dict[key] = whole[list(self.members[i])]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _keep(self, name: str, whole: Tensor) -> None:
        for tensor, experts in zip(tensors_of(self), self.members, strict=True):
            if name in tensor.segments:
                tensor.release()
                part = whole.detach()[experts]
                # transformers marks what it has loaded, and initialises the rest.
                part._is_hf_initialized = True  # type: ignore[attr-defined]
                tensor._buffers[name] = part

    def _whole(self, name: str) -> Tensor:
        tensors, found = tensors_of(self), None
        for tensor, experts in zip(tensors, self.members, strict=True):
            if name not in tensor.segments:
                continue
            part = tensor.parts()[name]
            if found is None:
                found = part.new_zeros(part_shape(name, self.shape, tensor.group_size))
            found[experts] = part
        assert found is not None
        return found


def tensors_of(weight: NestedTensor | NestedStack) -> list[NestedTensor]:
    """What a weight is held as: one tensor for each of its widths."""
    if isinstance(weight, NestedTensor):
        return [weight]
    return [tensor for tensor in weight.stacks if isinstance(tensor, NestedTensor)]


def stack_of(
    config: FissileConfig, name: str, shape: tuple[int, ...]
) -> NestedTensor | NestedStack:
    """An empty stack of the configuration's widths.

    Raises:
        ValueError: the widths are not those of a stack of this shape.
    """
    widths = config.widths_of(name)
    if isinstance(widths, int):
        return NestedTensor(config, name, shape, widths)
    if len(widths) != shape[0]:
        raise ValueError(f"nested.mixed of {name}: {len(widths)} widths, {shape[0]} experts")
    return NestedStack(config, name, shape, widths)


def routes_of(
    weight: NestedTensor | NestedStack, index_TK: Tensor, weights_TK: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The route to each tensor of a weight, whose sum of outputs is that of all.

    An expert of another tensor has weight zero: nothing is computed for it. No value goes through
    the host, so that a step can be captured in a CUDA graph.

    Args:
        weight: the stack.
        index_TK: chosen experts.
        weights_TK: weight of each chosen expert's output.
    """
    if isinstance(weight, NestedTensor):
        return [(index_TK, weights_TK)]
    stack_E, index_E = weight.maps(index_TK.device)
    stack_TK, own_TK = stack_E[index_TK], index_E[index_TK]
    routes = []
    for i in range(len(weight.stacks)):
        mine = stack_TK == i
        routes.append((own_TK * mine, weights_TK * mine))
    return routes
