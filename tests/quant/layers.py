"""Synthetic layers with inputs as correlated as those of a language model."""

from __future__ import annotations

import numpy as np
import torch


def hessian(inputs: int, kind: str, seed: int = 0) -> torch.Tensor:
    """Mean of x x^T of a kind: "iid", "power" (decaying spectrum), "chain" (AR(1)), "outliers"."""
    random = np.random.default_rng(seed)
    if kind == "iid":
        return torch.eye(inputs)
    if kind == "chain":
        index = np.arange(inputs)
        return torch.from_numpy(0.8 ** np.abs(index[:, None] - index)).float()
    basis, _ = np.linalg.qr(random.standard_normal((inputs, inputs)))
    decay = {"power": 0.7, "outliers": 1.2}[kind]
    matrix = (basis * (1.0 + np.arange(inputs)) ** -decay) @ basis.T
    if kind == "outliers":
        channel = np.exp(0.5 * random.standard_normal(inputs))
        channel[random.choice(inputs, max(1, inputs // 100), replace=False)] *= 8
        matrix = matrix * channel[:, None] * channel
    return torch.from_numpy(matrix).float()


def weight(*shape: int, seed: int = 1, heavy: bool = False) -> torch.Tensor:
    """Gaussian weights, or Student-t with five degrees of freedom."""
    random = np.random.default_rng(seed)
    values = random.standard_t(5, shape) if heavy else random.standard_normal(shape)
    return torch.from_numpy(0.02 * values).float()


def loss_rows(error: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """E H E^T of every row in float64."""
    error, matrix = error.double(), matrix.double()
    return torch.einsum("...oi,...ij,...oj->...o", error, matrix, error)
