"""What a routed model computes while it is scored; thresholds meet their mean on other text.

Shapes: T tokens, K slots per token, E experts, M neurons per expert, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fissile.models.modules_fissile import FissileExperts


class ActiveShare:
    """Counts the expert neurons that tokens have chosen.

    Attributes:
        neurons: computed so far, over all layers and tokens, shared ones not included.
        tokens: that the first counted layer has seen.
    """

    def __init__(self) -> None:
        self.neurons, self.tokens = 0, 0

    def share(self, shared: int, every: int) -> float | None:
        """Share of a token's FFN neurons that were computed; None before anything was counted.

        Args:
            shared: shared neurons of all layers.
            every: neurons of all layers.
        """
        return (self.neurons / self.tokens + shared) / every if self.tokens else None


@contextmanager
def counting_active(model: nn.Module) -> Iterator[ActiveShare]:
    """Count what the stacked experts of a model compute inside the block.

    Args:
        model: converted, with float weights; other modules are not counted.
    """
    found = ActiveShare()
    stacks = [m for m in model.modules() if isinstance(m, FissileExperts)]

    def count(stack: FissileExperts, args: tuple[Any, ...]) -> None:
        x_TD, _, weights_TK = args
        found.neurons += stack.intermediate_dim * int(torch.count_nonzero(weights_TK))
        found.tokens += len(x_TD) if stack is stacks[0] else 0

    handles = [stack.register_forward_pre_hook(count) for stack in stacks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
