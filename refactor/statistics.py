"""Per-neuron statistics of one FFN layer, gathered while calibration text streams through it.

The neuron activations h = act(gate x) * (up x) are the input of the down projection.
Shapes: T tokens, D model width, F FFN width, N domains, Q sketch width.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Score = Literal["fluctuation", "energy", "contribution", "magnitude", "rate"]
_ROWS = 64
"""Tokens per float64 copy of the activations: few enough that it stays in the processor's cache."""
_SKETCH_ROWS = 2048
"""Tokens per float32 product of the sketches: rounding inside one stays far below their noise."""


def column_norms(down_DF: Tensor) -> Tensor:
    """Norms ||w_i|| of the neurons' output vectors.

    Args:
        down_DF: weight of the down projection (D, F).

    Returns:
        (F,) float64.
    """
    return down_DF.double().square().sum(0).sqrt()


def token_signs(index_T: Tensor, width: int, seed: int) -> Tensor:
    """Random signs r_t of every token: a hash of (seed, token index), so no state is carried.

    Layers, chunk sizes and resumed runs agree on the signs of a token, which is what makes the
    sketches of different layers comparable.

    Args:
        index_T: int64 (T,), place of each token in the calibration stream.
        width: Q, signs per token.
        seed: of the whole sketch.

    Returns:
        (T, Q) float32 of -1 and +1.
    """
    words = -(-width // 32)
    counter_TW = index_T.cpu()[:, None] * words + torch.arange(words)
    key: NDArray[np.uint64] = counter_TW.numpy().view(np.uint64)
    with np.errstate(over="ignore"):  # splitmix64 is defined modulo 2^64
        key = (key + np.uint64(seed + 1) * np.uint64(0xD1B54A32D192ED03)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    key = (key ^ (key >> np.uint64(31))) >> np.uint64(32)
    octets = key.astype("<u4").view(np.uint8).reshape(len(index_T), words * 4)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, :width]
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).to(index_T.device)


def count_largest(size_TF: Tensor, count: int) -> Tensor:
    """How often each column is among the `count` largest of its row.

    Args:
        size_TF: values (T, F).
        count: columns per row, 1..F.

    Returns:
        (F,) float32, sums to T * count: of equal values, only as many are counted as there is room
        for.
    """
    if size_TF.device.type == "cpu":
        # Quickselect in numpy is many times faster than top-k in torch.
        place = size_TF.shape[1] - count
        least_T = torch.from_numpy(np.partition(size_TF.numpy(), place, axis=1)[:, place].copy())
    else:
        least_T = torch.topk(size_TF, count, dim=1).values[:, -1]
    among_TF = (size_TF >= least_T[:, None]).to(torch.float32)
    found_F = among_TF.sum(0)
    if round(float(found_F.double().sum())) == count * len(size_TF):
        return found_F
    index_TK = torch.topk(size_TF, count, dim=1).indices
    return torch.bincount(index_TK.flatten(), minlength=size_TF.shape[1]).to(torch.float32)


class NeuronStatistics:
    """Sums over tokens per neuron: mean h, |h|, h^2 by domain, activation rate, random sketches.

    Args:
        down_norm_F: (F,) norms of the neurons' output vectors, see `column_norms`.
        domains: N, number of domain labels.
        sketch_dim: Q, width of the sketches.
        seed: of the sketch signs; equal for all layers of a model.
        top: neurons per token that count as active for the rate; default F/16, at least 1.

    Attributes:
        tokens_N: int64 (N,), tokens seen per domain.
    """

    _SUMS = ("tokens_N", "sum_NF", "abs_NF", "square_NF", "active_F")
    _SKETCHES = ("signed_FQ", "magnitude_FQ", "signs_Q")

    def __init__(
        self,
        down_norm_F: Tensor,
        *,
        domains: int,
        sketch_dim: int,
        seed: int,
        top: int | None = None,
    ) -> None:
        width = len(down_norm_F)
        if domains < 1 or sketch_dim < 1 or width < 1:
            raise ValueError(
                f"domains {domains}, sketch_dim {sketch_dim}, width {width}: need >= 1"
            )
        self.top = max(1, width // 16) if top is None else top
        if not 1 <= self.top <= width:
            raise ValueError(f"top {top} is not in 1..{width}")
        self.seed, self.down_norm_F = seed, down_norm_F.double()
        device = down_norm_F.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.tokens_N = zeros(domains, dtype=torch.int64)
        self.sum_NF, self.abs_NF = zeros(domains, width), zeros(domains, width)
        self.square_NF = zeros(domains, width)
        self.active_F = zeros(width, dtype=torch.int64)
        self.signed_FQ, self.magnitude_FQ = zeros(width, sketch_dim), zeros(width, sketch_dim)
        self.signs_Q = zeros(sketch_dim)

    def add(self, h_TF: Tensor, domain_T: Tensor, index_T: Tensor) -> None:
        """Add T tokens.

        Args:
            h_TF: activations (T, F), any float dtype.
            domain_T: int64 (T,), domain label of each token, 0..N-1.
            index_T: int64 (T,), place of each token in the calibration stream.

        Raises:
            ValueError: shapes or labels do not fit, or an activation is not finite.
        """
        if h_TF.ndim != 2 or h_TF.shape[1] != len(self.active_F):
            raise ValueError(f"h {tuple(h_TF.shape)} is not (T, {len(self.active_F)})")
        if domain_T.shape != h_TF.shape[:1] or index_T.shape != h_TF.shape[:1]:
            raise ValueError(f"need one domain label and one index for each of {len(h_TF)} tokens")
        domains = len(self.tokens_N)
        if len(domain_T) and not 0 <= int(domain_T.min()) <= int(domain_T.max()) < domains:
            raise ValueError(f"domain labels must be in 0..{domains - 1}")
        for part in range(0, len(h_TF), _SKETCH_ROWS):
            rows = slice(part, part + _SKETCH_ROWS)
            self._add_rows(h_TF[rows], domain_T[rows], index_T[rows])

    def _add_rows(self, h_TF: Tensor, domain_T: Tensor, index_T: Tensor) -> None:
        size_TF = torch.empty(h_TF.shape, dtype=torch.float32, device=h_TF.device)
        sums_3NF, active_F = self._sums(h_TF, domain_T, size_TF)
        if not torch.isfinite(sums_3NF).all():
            raise ValueError("activations hold NaN or infinite values")
        self.tokens_N.index_add_(0, domain_T, torch.ones_like(domain_T))
        for total, part in zip((self.sum_NF, self.abs_NF, self.square_NF), sums_3NF, strict=True):
            total += part
        self.active_F += active_F
        signs_TQ = token_signs(index_T, len(self.signs_Q), self.seed)
        self.signed_FQ += (h_TF.to(torch.float32).T @ signs_TQ).double()
        self.magnitude_FQ += (size_TF.T @ signs_TQ).double()
        self.signs_Q += signs_TQ.double().sum(0)

    def _sums(self, h_TF: Tensor, domain_T: Tensor, size_TF: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 sums by domain of h, |h| and h^2, (3, N, F), and activity (F,) of some tokens.

        Args:
            h_TF: activations.
            domain_T: label of each token.
            size_TF: |h| is written here, float32.
        """
        domains, device = len(self.tokens_N), h_TF.device
        sums_3NF = torch.zeros(3, domains, h_TF.shape[1], dtype=torch.float64, device=device)
        active_F = torch.zeros_like(self.active_F)
        norm_F = self.down_norm_F.to(torch.float32)
        copy_RF = torch.empty(_ROWS, h_TF.shape[1], dtype=torch.float64, device=device)
        for begin in range(0, len(h_TF), _ROWS):
            rows = slice(begin, begin + _ROWS)
            h64_RF = copy_RF[: len(h_TF[rows])].copy_(h_TF[rows])
            # A product with the labels' indicator is several times faster than index_add_ on rows.
            member_NR = torch.nn.functional.one_hot(domain_T[rows], domains).T.double()
            sums_3NF[0] += member_NR @ h64_RF
            size_TF[rows] = h64_RF.abs_()
            sums_3NF[1] += member_NR @ h64_RF
            sums_3NF[2] += member_NR @ h64_RF.square_()
            active_F += count_largest(size_TF[rows] * norm_F, self.top).to(torch.int64)
        return sums_3NF, active_F

    def merge(self, other: NeuronStatistics) -> None:
        """Add the tokens of `other`, gathered on the same layer with the same seed and widths.

        Raises:
            ValueError: the two were set up differently.
        """
        if (other.seed, other.top) != (self.seed, self.top) or any(
            getattr(other, name).shape != getattr(self, name).shape
            for name in self._SUMS + self._SKETCHES
        ):
            raise ValueError("statistics with different seed, top, width, domains or sketch")
        for name in self._SUMS + self._SKETCHES:
            getattr(self, name).add_(getattr(other, name))

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on later, as tensors."""
        setup = torch.tensor([self.seed, self.top])
        names = ("down_norm_F", *self._SUMS, *self._SKETCHES)
        return {"setup": setup, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> NeuronStatistics:
        """Inverse of `state`."""
        seed, top = state["setup"].tolist()
        domains, width = len(state["tokens_N"]), len(state["signs_Q"])
        self = cls(state["down_norm_F"], domains=domains, sketch_dim=width, seed=seed, top=top)
        for name in cls._SUMS + cls._SKETCHES:
            setattr(self, name, state[name].clone())
        return self

    @property
    def tokens(self) -> int:
        """Tokens seen over all domains."""
        return int(self.tokens_N.sum())

    def mean_F(self) -> Tensor:
        """E[h] over all tokens, (F,) float64."""
        return self.sum_NF.sum(0) / self._seen()

    def domain_scores(self, kind: Score = "magnitude") -> Tensor:
        """Importance of each neuron to each domain, (N, F) float64.

        Args:
            kind: see `score`; "magnitude" is the statistic of Read-ME, section 3.1. "rate" is not
                counted by domain.

        Raises:
            ValueError: a domain has no tokens, or an unknown kind.
        """
        if not bool((self.tokens_N > 0).all()):
            missing = torch.nonzero(self.tokens_N == 0).flatten().tolist()
            raise ValueError(f"no calibration tokens of domain {missing[0]}")
        sums = (self.sum_NF, self.abs_NF, self.square_NF)
        return self._scored(kind, *(each_NF / self.tokens_N[:, None] for each_NF in sums))

    def score(self, kind: Score) -> Tensor:
        """Importance of each neuron, (F,) float64.

        Args:
            kind: "fluctuation" Var(h) ||w||^2 (FLAP, section 3.2) where the mean is compensated;
                "energy" E[h^2] ||w||^2 where it is not; "contribution" E|h| ||w||;
                "magnitude" E|h|; "rate" share of tokens among whose `top` neurons it is.
        """
        seen = self._seen()
        if kind == "rate":
            return self.active_F.double() / seen
        sums = (self.sum_NF, self.abs_NF, self.square_NF)
        return self._scored(kind, *(each_NF.sum(0) / seen for each_NF in sums))

    def _scored(self, kind: Score, mean: Tensor, mean_abs: Tensor, mean_square: Tensor) -> Tensor:
        """A score from E h, E|h| and E h^2, each (..., F)."""
        if kind == "fluctuation":
            # Rounding can leave a constant neuron slightly below zero.
            return (mean_square - mean.square()).clamp_min(0) * self.down_norm_F.square()
        if kind == "energy":
            return mean_square * self.down_norm_F.square()
        if kind == "contribution":
            return mean_abs * self.down_norm_F
        if kind == "magnitude":
            return mean_abs
        raise ValueError(f"score {kind!r} is not one of {', '.join(get_args(Score))} here")

    def features(self, *, of: Literal["signed", "magnitude"], centred: bool) -> Tensor:
        """Sketched token profiles of the neurons, for clustering.

        Args:
            of: "signed" profiles h ||w||, or "magnitude" profiles |h| ||w||.
            centred: subtract the neuron's mean first, so that only its variation counts.

        Returns:
            (F, Q) float64; the product of two rows estimates the second moment (covariance where
            centred) of the two neurons' profiles.
        """
        seen = self._seen()
        sketch_FQ = self.signed_FQ if of == "signed" else self.magnitude_FQ
        sums_NF = self.sum_NF if of == "signed" else self.abs_NF
        if centred:
            sketch_FQ = sketch_FQ - torch.outer(sums_NF.sum(0) / seen, self.signs_Q)
        return sketch_FQ * self.down_norm_F[:, None] / (seen * len(self.signs_Q)) ** 0.5

    def _seen(self) -> int:
        if self.tokens == 0:
            raise ValueError("no calibration tokens were added")
        return self.tokens
