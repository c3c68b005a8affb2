"""The spectral-mass router: how much a layer's input excites each expert, without computing it.

s_e(x) = sqrt(x^T A_e x * x^T B_e x) with A_e = sum_i p_i g_i g_i^T, B_e = sum_i u_i u_i^T over the
expert's gate and up rows and p_i = E[sigma(g_i x)^2], sigma(z) = act(z) / z being how far a gate is
open. Both forms are kept at a low rank, chosen in the metric of the inputs.
Shapes: T tokens, D model width, F FFN width, E experts, M neurons per expert, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fissile.refactor.partition import Partition

_ROWS = 4096
"""Tokens per product."""
_SMALL = 1e-4
"""act(z) / z is taken at this z where the gate is closer to zero."""


class SpectralStatistics:
    """Sums over tokens of sigma(g_i x)^2 per neuron and of x x^T.

    Args:
        gate_FD: weight of the gate projection.
        activation: of the gate, elementwise.

    Attributes:
        count: tokens seen.
    """

    def __init__(self, gate_FD: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        width, inputs = gate_FD.shape
        self._gate_FD, self._activation = gate_FD.float(), activation
        self.count = 0
        self._open_F = torch.zeros(width, dtype=torch.float64, device=gate_FD.device)
        self._xx_DD = torch.zeros(inputs, inputs, dtype=torch.float64, device=gate_FD.device)

    def add(self, x_TD: Tensor) -> None:
        """Add T tokens: the FFN's inputs, any float dtype.

        Raises:
            ValueError: another width, or a value is not finite.
        """
        if x_TD.ndim != 2 or x_TD.shape[1] != len(self._xx_DD):
            raise ValueError(f"x {tuple(x_TD.shape)} is not (T, {len(self._xx_DD)})")
        for part in x_TD.split(_ROWS):
            x = part.float()
            z = x @ self._gate_FD.T
            z = torch.where(z.abs() < _SMALL, _SMALL, z)
            opened = (self._activation(z) / z).square().double().sum(0)
            if not torch.isfinite(opened.sum()):
                raise ValueError("inputs hold NaN or infinite values")
            self._open_F += opened
            self._xx_DD += (x.T @ x).double()
            self.count += len(x)

    def openness_F(self) -> Tensor:
        """p_i = E[sigma(g_i x)^2] of every neuron, float64."""
        return self._open_F / self._seen()

    def second_moment_DD(self) -> Tensor:
        """E[x x^T], float64."""
        return self._xx_DD / self._seen()

    def _seen(self) -> int:
        if self.count == 0:
            raise ValueError("no calibration tokens were added")
        return self.count


def spectral_selector(
    stats: SpectralStatistics, gate_FD: Tensor, up_FD: Tensor, partition: Partition, rank: int
) -> dict[str, Tensor]:
    """Low-rank factors of every expert's two quadratic forms.

    The best rank-R form in the mean over inputs keeps the principal components of the M numbers
    sqrt(p_i) g_i x: of E[x x^T] only an M x M product is needed, never its root or inverse.

    Args:
        stats: of the layer's inputs.
        gate_FD: weight of the gate projection.
        up_FD: weight of the up projection.
        partition: disjoint experts.
        rank: R, 1..M.

    Returns:
        `selector.gate` and `selector.up` (E * R, D), float32: for routing `selector: spectral`,
        `selector_rank: R`.

    Raises:
        ValueError: the rank does not fit, or no tokens were added.
    """
    if not 1 <= rank <= partition.expert_size:
        raise ValueError(f"rank {rank} is not in 1..{partition.expert_size}")
    moment_DD, open_F = stats.second_moment_DD(), stats.openness_F()
    gates, ups = [], []
    for index_M in partition.experts_EM:
        root = open_F[index_M].sqrt()
        gates.append(_principal(gate_FD[index_M].double() * root[:, None], moment_DD, rank))
        ups.append(_principal(up_FD[index_M].double(), moment_DD, rank))
    return {
        "selector.gate": torch.cat(gates).float(),
        "selector.up": torch.cat(ups).float(),
    }


def _principal(rows_MD: Tensor, moment_DD: Tensor, rank: int) -> Tensor:
    """Rows (R, D) whose outputs hold most of E ||rows x||^2."""
    _, vectors = torch.linalg.eigh(rows_MD @ moment_DD @ rows_MD.T)
    return vectors[:, -rank:].T @ rows_MD
