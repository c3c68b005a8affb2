"""The device on which a launch happens: Triton takes the current one, wherever the tensors are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within it, the device of `tensor` is the current one.

    Args:
        tensor: of the launch; one on the CPU, as under the interpreter, changes nothing.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
