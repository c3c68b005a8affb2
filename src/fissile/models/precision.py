"""Routers in their own precision while everything around them computes in less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

ROUTER_PARTS = (".router.", ".selector.")
"""What names of a router's parameters contain."""


@contextmanager
def exact_routers(model: nn.Module) -> Iterator[None]:
    """Routers of a model without autocast, until the block ends.

    Under autocast a router would choose other experts than it will choose in use.
    """
    ends = tuple(part[:-1] for part in ROUTER_PARTS)
    forwards: dict[nn.Module, Callable[..., Any]] = {
        module: partial(_exactly, module.forward)
        for name, module in model.named_modules()
        if f".{name}".endswith(ends)
    }
    with replaced_forwards(forwards):
        yield


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules with other forward functions, until the block ends."""
    for module, forward in forwards.items():
        # On the instance, over the class's: gone again with `del`.
        object.__setattr__(module, "forward", forward)
    try:
        yield
    finally:
        for module in forwards:
            object.__delattr__(module, "forward")


def _exactly(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a forward function without autocast, its float inputs in float32."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    with torch.autocast(tensors[0].device.type, enabled=False):
        return forward(*(_wide(a) for a in args), **{k: _wide(a) for k, a in kwargs.items()})


def _wide(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if low else value
