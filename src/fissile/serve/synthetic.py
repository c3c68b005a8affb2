"""Traces with known statistics: uniform, popular experts, and requests that stay with theirs.

Shapes: R requests, T rows, D decisions, E experts, K chosen per decision.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fissile.errors import UsageError
from fissile.serve.trace import ModelShape, Trace

Kind = Literal["uniform", "zipf", "local"]
KINDS: tuple[str, ...] = get_args(Kind)
_DOMAINS = 4
_BLOCK = 4096  # rows drawn at once: T x D x E random numbers would not fit for large models


def unit_model(layers: int, experts: int, top_k: int = 1, bytes_: int = 1) -> ModelShape:
    """A model whose experts have one plane of so many bytes and cost nothing to compute."""
    return ModelShape("synthetic", layers, experts, top_k, ((bytes_,),), 0.0)


def synthetic_trace(
    kind: str,
    model: ModelShape,
    *,
    requests: int,
    prompt: tuple[int, int] = (1, 1),
    output: tuple[int, int] = (1, 1),
    one_decision: bool = True,
    rate: float = 1.0,
    stay: float = 0.7,
    skew: float = 1.0,
    seed: int = 0,
) -> Trace:
    """Draw a trace.

    "uniform": every choice is independent and even. "zipf": the expert of rank i of a layer is
    chosen with weight 1/i^skew. "local": requests belong to one of four domains, each with its own
    such order, and a token keeps the choices of the token before with probability `stay` (Read-ME
    measures 0.71 for its router, 0.21 for Mixtral's).

    Args:
        kind: see above.
        model: sizes.
        requests: R.
        prompt: least and most tokens of a prompt, drawn evenly.
        output: least and most tokens generated.
        one_decision: one decision for all layers, as a pre-gating router makes.
        rate: requests per second, Poisson.
        stay: of "local".
        skew: of "zipf" and "local".
        seed: of everything.

    Raises:
        UsageError: an unknown kind or sizes out of range.
    """
    _check(kind, requests, prompt, output, rate, stay, skew)
    rng = np.random.default_rng(seed)
    prompts = rng.integers(prompt[0], prompt[1], requests, endpoint=True).astype(np.int32)
    outputs = rng.integers(output[0], output[1], requests, endpoint=True).astype(np.int32)
    arrival = np.cumsum(rng.exponential(1 / rate, requests))
    domain = rng.integers(_DOMAINS, size=requests) if kind == "local" else np.zeros(requests)
    rows = (prompts + outputs - 1).astype(np.int64)
    decisions = 1 if one_decision else model.layers
    weights = _popularity(kind, skew, decisions, model.experts, rng)
    routes = _draw(weights, np.repeat(domain.astype(np.int64), rows), model.top_k, rng)
    if kind == "local":
        begins = np.zeros(len(routes), dtype=bool)
        begins[np.concatenate([[0], np.cumsum(rows)[:-1]])] = True
        routes = _persist(routes, begins | (rng.random(len(routes)) >= stay))
    names = tuple(f"domain {i}" for i in range(_DOMAINS)) if kind == "local" else ("all",)
    return Trace(
        model,
        routes,
        prompts,
        outputs,
        arrival,
        domain.astype(np.int16),
        names,
        source={"synthetic": kind, "seed": seed, "stay": stay, "skew": skew},
    )


def _check(
    kind: str,
    requests: int,
    prompt: tuple[int, int],
    output: tuple[int, int],
    rate: float,
    stay: float,
    skew: float,
) -> None:
    if kind not in KINDS:
        raise UsageError(f"synthetic trace {kind!r}: one of {', '.join(KINDS)}")
    for name, (low, high) in {"prompt": prompt, "output": output}.items():
        if not 1 <= low <= high:
            raise UsageError(f"{name} of {low} to {high} tokens: at least 1, in ascending order")
    if requests < 1 or not 0 <= stay < 1 or skew < 0 or rate <= 0:
        raise UsageError(
            f"requests {requests}, stay {stay:g}, skew {skew:g}, rate {rate:g}: at least 1, in"
            " [0, 1), at least 0, above 0"
        )


def _popularity(
    kind: str, skew: float, decisions: int, experts: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Log weight of each expert, (domains, D, E)."""
    power = 0.0 if kind == "uniform" else skew
    base = -power * np.log(np.arange(1, experts + 1))
    domains = _DOMAINS if kind == "local" else 1
    table = np.tile(base, (domains, decisions, 1))
    return rng.permuted(table, axis=-1)


def _draw(
    weights: NDArray[np.float64], domain_T: NDArray[np.int64], top_k: int, rng: np.random.Generator
) -> NDArray[np.int16]:
    """K different experts per row and decision with chances that follow the weights (Gumbel)."""
    found = np.empty((len(domain_T), weights.shape[1], top_k), dtype=np.int16)
    for begin in range(0, len(domain_T), _BLOCK):
        logits = weights[domain_T[begin : begin + _BLOCK]]
        noisy = logits + rng.gumbel(size=logits.shape)
        found[begin : begin + _BLOCK] = np.argpartition(-noisy, top_k - 1, axis=-1)[..., :top_k]
    return found


def _persist(routes: NDArray[np.int16], fresh_T: NDArray[np.bool_]) -> NDArray[np.int16]:
    """Rows that are not fresh repeat the last fresh one; the first row is fresh."""
    last = np.maximum.accumulate(np.where(fresh_T, np.arange(len(fresh_T)), 0))
    return routes[last]
