"""Second moments of layer inputs: streamed, per expert, shrunk where tokens are few.

Shapes: T tokens, D inputs, E experts, K experts chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.workers import Workers


class HessianAccumulator:
    """Streams the mean of x x^T over tokens, for one layer input or for each of E experts.

    Products are taken in float32 (float64 for float64 inputs) and summed in `dtype`.

    Args:
        dim: D, the width of the inputs.
        batch: () for one Hessian, (E,) for one an expert.
        device: where the sums live; inputs must be there too.
        dtype: of the sums; float32 halves the memory and is enough for up to some thousand calls.

    Raises:
        ValueError: `batch` has more than one entry.
    """

    def __init__(
        self,
        dim: int,
        batch: tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if len(batch) > 1:
            raise ValueError(f"batch {batch} has {len(batch)} dimensions, accepted: 0 or 1")
        self.dim, self.batch = dim, batch
        experts = batch[0] if batch else 1
        self._sum_EDD = torch.zeros(experts, dim, dim, dtype=dtype, device=device)
        self._count_E = torch.zeros(experts, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, x_TD: Tensor, index: Tensor | None = None, left_TD: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            x_TD: float (..., D); leading dimensions are flattened to T tokens.
            index: integer (T,) or (T, K), the experts that see each token; -1 for none. Required
                if and only if the accumulator is per expert.
            left_TD: sum left x^T instead of x x^T; shaped as `x_TD`.

        Raises:
            ValueError: wrong shape, an expert id out of range, or a value that is not finite.
        """
        x_TD = x_TD.detach().reshape(-1, x_TD.shape[-1])
        if x_TD.shape[1] != self.dim:
            raise ValueError(f"inputs have width {x_TD.shape[1]}, accepted: {self.dim}")
        if x_TD.dtype != torch.float64:
            x_TD = x_TD.float()
        if not torch.isfinite(x_TD).all():
            raise ValueError("inputs of the Hessian hold a value that is not finite")
        left_TD = x_TD if left_TD is None else left_TD.detach().reshape(x_TD.shape).to(x_TD.dtype)
        if (index is None) != (self.batch == ()):
            found = "missing" if index is None else "given"
            raise ValueError(f"index is {found} and batch is {self.batch}: give both or neither")
        if not len(x_TD):
            return
        if index is None:
            self._sum_EDD[0] += left_TD.T @ x_TD
            self._count_E[0] += x_TD.shape[0]
        else:
            self._add_routed(x_TD, index, left_TD)

    def _add_routed(self, x_TD: Tensor, index: Tensor, left_TD: Tensor) -> None:
        experts, tokens = self.batch[0], x_TD.shape[0]
        if index.shape[:1] != (tokens,) or index.dim() not in (1, 2):
            raise ValueError(f"index has shape {tuple(index.shape)}, accepted: ({tokens}, K)")
        ids = index.reshape(tokens, -1).to(torch.int64)
        if ids.numel() and not (int(ids.min()) >= -1 and int(ids.max()) < experts):
            raise ValueError(
                f"index holds {int(ids.min())} to {int(ids.max())}, accepted: -1 to {experts - 1}"
            )
        # One stable sort puts every expert's tokens side by side; -1 sorts to the front.
        order = ids.flatten().argsort(stable=True) // max(ids.shape[1], 1)
        counts = torch.bincount(ids.flatten() + 1, minlength=experts + 1)
        for expert, rows in enumerate(order.split(counts.tolist())[1:]):
            if len(rows):
                x_ND = x_TD.index_select(0, rows)
                left_ND = x_ND if left_TD is x_TD else left_TD.index_select(0, rows)
                self._sum_EDD[expert] += left_ND.T @ x_ND
        self._count_E += counts[1:]

    def finish(self, workers: Workers | None = None) -> tuple[Tensor, Tensor]:
        """Return the means and how many tokens each rests on.

        Args:
            workers: processes that have each added some of the tokens; call it once then.

        Returns:
            hessian: float32 (D, D) or (E, D, D), sum of x x^T over the count; zeros without tokens.
            counts: int64 () or (E,).
        """
        if workers is not None:
            workers.sum_([self._sum_EDD, self._count_E])
        mean = (self._sum_EDD / self._count_E.clamp(min=1)[:, None, None]).float()
        return mean.reshape(*self.batch, self.dim, self.dim), self._count_E.reshape(self.batch)


Measured = tuple[Tensor, Tensor | None, Tensor]
"""Hessian, drift and tokens of an input, or of each expert's."""


class Moments:
    """Second moments of inputs of the quantized model, and how far they drifted from the float's.

    Args:
        dim: D, the width of the inputs.
        batch: () for one input, (E,) for one an expert.
        drift: sum (y - x) x^T too, y the float model's inputs.
    """

    def __init__(self, dim: int, batch: tuple[int, ...] = (), *, drift: bool) -> None:
        self._hessian = HessianAccumulator(dim, batch)
        # It enters the targets by a share: single precision is plenty.
        self._drift = HessianAccumulator(dim, batch, dtype=torch.float32) if drift else None

    def add(self, x_TD: Tensor, y_TD: Tensor | None, index: Tensor | None = None) -> None:
        """Add tokens: x of the quantized model, y of the float model, as `HessianAccumulator`."""
        self._hessian.add(x_TD, index)
        if self._drift is not None:
            assert y_TD is not None
            self._drift.add(x_TD, index, y_TD - x_TD)

    def finish(self, workers: Workers | None = None) -> Measured:
        """Mean Hessian, mean drift (None without) and tokens, of all processes."""
        hessian, tokens = self._hessian.finish(workers)
        drift = None if self._drift is None else self._drift.finish(workers)[0]
        return hessian, drift, tokens


def shrunk(routed: Measured, wide: Measured) -> Measured:
    """`shrink` of the moments of experts towards those of all tokens."""
    hessian, drift, counts = routed
    if drift is not None and wide[1] is not None:
        drift = shrink(drift, counts, wide[1])
    return shrink(hessian, counts, wide[0]), drift, counts


def shrink(hessian_EDD: Tensor, counts: Tensor, layer_hessian: Tensor) -> Tensor:
    """Pull the Hessians of experts with few tokens towards that of the layer.

    (1 - rho) H_e + rho H_layer with rho = D / (D + N_e): N_e tokens span at most N_e directions, so
    an expert with fewer tokens than inputs has a Hessian without full rank.

    Args:
        hessian_EDD: float (E, D, D), means over the tokens of each expert.
        counts: integer (E,), tokens of each expert; 0 gives the layer's Hessian.
        layer_hessian: float (D, D), or (E, D, D) where inputs differ between experts.

    Returns:
        float (E, D, D), dtype of `hessian_EDD`.

    Raises:
        ValueError: shapes do not fit.
    """
    experts, dim = hessian_EDD.shape[0], hessian_EDD.shape[-1]
    if counts.shape != (experts,) or layer_hessian.shape[-2:] != (dim, dim):
        raise ValueError(
            f"hessian {tuple(hessian_EDD.shape)}, counts {tuple(counts.shape)} and layer hessian "
            f"{tuple(layer_hessian.shape)} do not fit"
        )
    rho_E11 = (dim / (dim + counts.double()))[:, None, None]
    return torch.lerp(hessian_EDD, layer_hessian.to(hessian_EDD), rho_E11.to(hessian_EDD))
