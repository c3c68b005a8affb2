"""Share of the oracle's gap that a router closes, in log perplexity. Loads no torch.

closed = (ln ppl(base) - ln ppl(router)) / (ln ppl(base) - ln ppl(oracle)); the base is the static
model or the analytic router (CMoE's) at the same active share and the same recovery.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fissile.run.metrics import Metrics, Score, Variant, find_variant

Base = Literal["static", "cmoe"]
_ERRORS = 2.0
OWN_ORACLE = {
    "pregate": "oracle",
    "pregate_dynamic": "oracle",
    "token": "oracle",
    "per_layer": "oracle_per_layer",
    "per_layer_dynamic": "oracle_per_layer",
    "ridge": "oracle_layerwise",
    "mean_gate": "oracle_layerwise",
    "spectral": "oracle_layerwise",
    "dynamic": "oracle_layerwise",
}
"""Routers among our experts, and the oracle on the experts of each."""


@dataclass(frozen=True)
class Gap:
    """How far a router goes from the base to the oracle.

    Args:
        closed: 0 at the base, 1 at the oracle; negative where the router is worse than the base.
        error: standard error over documents, None where they are not the same ones.
    """

    closed: float
    error: float | None

    def __str__(self) -> str:
        """In words: "62 ± 5 %"."""
        if self.error is None:
            return f"{100 * self.closed:.0f} %"
        digits = 1 if self.error < 0.005 else 0
        return f"{100 * self.closed:.{digits}f} ± {100 * self.error:.{digits}f} %"


def gap_closed(base: Score, router: Score, oracle: Score) -> Gap | None:
    """Share of the gap between base and oracle; None where the oracle is not clearly better.

    The error is the delta method's for a ratio of two sums over documents.

    Args:
        base: what is there without a router.
        router: what is judged.
        oracle: the upper bound on the same experts.
    """
    whole = base.log_ratio(oracle)
    part = base.log_ratio(router)
    if whole is None or part is None:
        return None
    gap, gap_error = whole
    if gap <= (_ERRORS * gap_error if gap_error is not None else 0.0):
        return None
    closed = part[0] / gap
    if not _paired(base, router, oracle) or len(base.document_nll) < 2:
        return Gap(closed, None)
    residuals = [
        (b - r) - closed * (b - o)
        for b, r, o in zip(base.document_nll, router.document_nll, oracle.document_nll, strict=True)
    ]
    n = len(residuals)
    spread = math.sqrt(math.fsum(v * v for v in residuals) * n / (n - 1))
    return Gap(closed, spread / (gap * sum(base.document_tokens)))


def _paired(*scores: Score) -> bool:
    tokens = scores[0].document_tokens
    return bool(tokens) and all(
        s.document_tokens == tokens and len(s.document_nll) == len(tokens) for s in scores
    )


def oracle_of(metrics: Metrics, variant: Variant) -> Variant | None:
    """The oracle on the experts that a router chooses among, same share and recovery.

    Args:
        metrics: of one run.
        variant: a router; None for systems that have experts of their own.
    """
    own = OWN_ORACLE.get(variant.name)
    names = () if own is None else (own, "oracle")
    found = (find_variant(metrics, name, variant.share, variant.recovery) for name in names)
    return next((v for v in found if v is not None), None)


def variant_gap(metrics: Metrics, variant: Variant, base: Base) -> Gap | None:
    """`gap_closed` of a measured router; None where base or oracle were not measured.

    Args:
        metrics: of one run.
        variant: the router.
        base: which model stands for no router.
    """
    start = find_variant(metrics, base, variant.share, variant.recovery)
    oracle = oracle_of(metrics, variant)
    if start is None or oracle is None:
        return None
    return gap_closed(start, variant, oracle)
