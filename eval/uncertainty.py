"""Standard errors of what evaluation reports. Loads no torch.

Tokens of one document are not independent, so documents are the sampling units everywhere: a
perplexity is exp of a ratio of two sums over documents, and its standard error is the delta
method's for that ratio. Two models measured on the same documents are compared by the differences
per document (paired), which removes the much larger spread between documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def ratio_stderr(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of sum(sums) / sum(counts) with one pair per document.

    Delta method for a ratio of means over D independent documents, with the factor D / (D - 1):
    sqrt(D / (D - 1) * Σ_d (sums_d - r·counts_d)²) / Σ_d counts_d.

    Args:
        sums: per document, e.g. total negative log-likelihood in nats.
        counts: per document, predicted tokens.

    Returns:
        The standard error, in units of sums per count; None for fewer than two documents, where
        nothing can be said.
    """
    used = [(s, c) for s, c in zip(sums, counts, strict=True) if c > 0]
    if len(used) < 2:
        return None
    total = sum(c for _, c in used)
    ratio = math.fsum(s for s, _ in used) / total
    spread = math.fsum((s - ratio * c) ** 2 for s, c in used)
    return math.sqrt(spread * len(used) / (len(used) - 1)) / total


def paired_log_ratio(
    nll_a: Sequence[float], nll_b: Sequence[float], tokens: Sequence[int]
) -> tuple[float, float | None]:
    """log(ppl_a / ppl_b) on the same documents and its standard error.

    Args:
        nll_a: total negative log-likelihood per document, nats, model a.
        nll_b: the same for model b.
        tokens: predicted tokens per document, the same for both.

    Returns:
        (log ratio, standard error or None); negative means that a is better.

    Raises:
        ValueError: lengths differ or no token was predicted.
    """
    if not len(nll_a) == len(nll_b) == len(tokens) or sum(tokens) <= 0:
        raise ValueError(f"{len(nll_a)}, {len(nll_b)} and {len(tokens)} documents do not pair")
    differences = [a - b for a, b in zip(nll_a, nll_b, strict=True)]
    return math.fsum(differences) / sum(tokens), ratio_stderr(differences, tokens)


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean of independent values (sample standard deviation / sqrt(n)).

    Args:
        values: e.g. one credit in [0, 1] per multiple-choice item.
    """
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def pooled_stderr(errors: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Standard error of an average over groups weighted by size, from the pooled variance.

    sqrt(Σ (n_i - 1)·n_i·e_i² / (Σ n_i - k) / Σ n_i) for k groups: lm-evaluation-harness's formula
    for groups of tasks, which leaves out the spread between the groups' means.

    Args:
        errors: standard error of each group's mean; None where it has a single value.
        sizes: values in each group.
    """
    if any(error is None for error in errors) or sum(sizes) <= len(sizes):
        return None
    spread = sum((n - 1) * n * (e or 0.0) ** 2 for e, n in zip(errors, sizes, strict=True))
    return math.sqrt(spread / (sum(sizes) - len(sizes)) / sum(sizes))
