"""Plain float32 matrix product with bit-nested weights: the oracle of every kernel.

Shapes: T tokens, N output rows, K inputs, G groups, g = K/G inputs a group; "..." leading
dimensions shared by input and weight (experts, for instance).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fissile.kernels.layout import decode_theta, unpack


def nested_matmul(x: Tensor, parts: Mapping[str, Tensor], bits: int) -> Tensor:
    """Return x W^T with W at `bits`, without building W.

    The affine floats are factored out of the groups (the zero is a rank-G correction):
    y = sum_g scale_g (x_g . q_g) + zero_g sum(x_g).

    Args:
        x: float (..., T, K).
        parts: planes up to `bits` and theta_`bits` of a weight (..., N, K).
        bits: 2, 3 or 4.

    Returns:
        float32 (..., T, N).

    Raises:
        ValueError: K of `x` and of the weight differ, or a part is missing.
    """
    codes = unpack(parts, bits)
    scale, zero = decode_theta(parts[f"theta_{bits}"])
    if x.shape[-1] != codes.shape[-1]:
        raise ValueError(f"x has K {x.shape[-1]}, the weight has K {codes.shape[-1]}")
    groups = scale.shape[-1]
    x_groups = x.float().unflatten(-1, (groups, -1))
    y = x_groups.sum(-1) @ zero.transpose(-1, -2)
    for g, codes_g in enumerate(codes.unflatten(-1, (groups, -1)).unbind(-2)):
        product = x_groups[..., g, :] @ codes_g.transpose(-1, -2).float()
        y = torch.addcmul(y, product, scale[..., g].unsqueeze(-2))
    return y
