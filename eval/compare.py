"""Two results on the same items, compared pair by pair. Loads no torch.

Differences are B's minus A's. Intervals are paired bootstrap intervals: documents (or whatever the
items were cut from) are drawn with replacement, both models' outcomes on them together, and the
middle 95 % of the statistic is reported. Perplexities are compared by the log of their ratio,
accuracies by their difference. For accuracies McNemar's test looks at the discordant pairs, the
items that exactly one of the two has right: exact binomial up to 1000 of them, chi-square with
continuity correction above. An item whose highest score is shared is not right in this test.

Legend: C clusters, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fissile.errors import UsageError

CONFIDENCE = 0.95
ONE_UNIT = "one document cannot tell"
_EXACT_PAIRS = 1000
_ELEMENTS_AT_ONCE = 1 << 22
_SAME = (
    "task_version",
    "convention",
    "data.sha256",
    "limit",
    "context",
    "bos",
    "shots",
    "template_sha256",
    "normalisation",
    "scoring",
)
_NOTED = ("model.sha256", "tokenizer_sha256", "dtype", "batch_tokens", "code.eval_sha256")


@dataclass(frozen=True)
class Interval:
    """A paired difference, B's minus A's.

    Args:
        value: the difference, or the log of the ratio.
        low: lower end of the bootstrap interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """One metric of two results.

    Args:
        metric: "ppl" or "accuracy".
        higher_is_better: direction of the metric.
        a: value of the first result.
        b: value of the second result.
        difference: log(b / a) for perplexities, b - a for accuracies.
        items: pairs.
        clusters: independent units among them.
        verdict: "A is better", "B is better", "no difference seen" (the interval includes zero), or
            `ONE_UNIT`: then there is no interval.
    """

    metric: str
    higher_is_better: bool
    a: float
    b: float
    difference: Interval
    items: int
    clusters: int
    verdict: str


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two models on the same items.

    Args:
        only_a: items that A alone has right.
        only_b: items that B alone has right.
        p_value: two-sided, of a split at least as uneven if neither were better.
        method: "exact binomial" or "chi-square with continuity correction".
    """

    only_a: int
    only_b: int
    p_value: float
    method: str


@dataclass(frozen=True)
class Comparison:
    """Everything that two results say about each other.

    Args:
        task: of both.
        total: over all items.
        groups: by domain or subject.
        mcnemar: for accuracies.
        differs: conditions in which the two differ, without making them incomparable.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    task: str
    total: Paired
    groups: dict[str, Paired]
    mcnemar: McNemar | None
    differs: dict[str, list[Any]]
    resamples: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "confidence": CONFIDENCE}


def compare(
    a: Mapping[str, Any], b: Mapping[str, Any], *, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Compare two results in the schema of `fissile.eval.result`, items included.

    Args:
        a: the first, e.g. the dense model's.
        b: the second.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        UsageError: not comparable; names the field and both values.
    """
    check_comparable(a, b)
    tokens = a["task"] == "perplexity"
    group = "domain" if tokens else "subject"
    pairs = list(zip(a["items"], b["items"], strict=True))
    # Under the gptq convention the windows of all the text carry no domain.
    whole = [pair for pair in pairs if pair[0].get(group) is None] or pairs
    make = _paired_nll if tokens else _paired_credit
    names = sorted({x[group] for x, _ in pairs if x.get(group) is not None})
    parts = {name: [p for p in pairs if p[0].get(group) == name] for name in names}
    return Comparison(
        a["task"],
        make(whole, resamples, seed),
        {name: make(part, resamples, seed) for name, part in parts.items()},
        None if tokens else _mcnemar_of(whole),
        _differences(a, b),
        resamples,
        seed,
    )


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Refuse results that do not pair.

    Raises:
        UsageError: names the first field that differs, and both values.
    """
    if a["task"] != b["task"]:
        raise UsageError(f"not comparable: task is {a['task']!r} in A, {b['task']!r} in B")
    for field in (*_SAME, *(["tokenizer_sha256"] if a["task"] == "perplexity" else [])):
        ours, theirs = _get(a["conditions"], field), _get(b["conditions"], field)
        if ours != theirs:
            raise UsageError(f"not comparable: {field} is {ours!r} in A, {theirs!r} in B")
    for name, result in (("A", a), ("B", b)):
        if not result.get("items"):
            raise UsageError(f"not comparable: items are missing in {name} (fissile eval --out)")
    if len(a["items"]) != len(b["items"]):
        raise UsageError(
            f"not comparable: items are {len(a['items'])} in A, {len(b['items'])} in B"
        )
    for x, y in zip(a["items"], b["items"], strict=True):
        for field in ("id", "tokens", "answer"):
            if x.get(field) != y.get(field):
                raise UsageError(
                    f"not comparable: {field} of item {x.get('id')!r} is {x.get(field)!r} in A,"
                    f" {y.get(field)!r} in B"
                )


def mcnemar(only_a: int, only_b: int) -> McNemar:
    """McNemar's test from the numbers of discordant pairs.

    Args:
        only_a: items that A alone has right.
        only_b: items that B alone has right.
    """
    n, k = only_a + only_b, min(only_a, only_b)
    if n <= _EXACT_PAIRS:
        tail = sum(math.comb(n, i) for i in range(k + 1))
        return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**n), "exact binomial")
    statistic = max(0, abs(only_a - only_b) - 1) ** 2 / n
    p_value = math.erfc(math.sqrt(statistic / 2))
    return McNemar(only_a, only_b, p_value, "chi-square with continuity correction")


def bootstrap_ratio(
    sums: Sequence[float], counts: Sequence[float], *, resamples: int, seed: int
) -> Interval:
    """Interval of sum(sums) / sum(counts), clusters drawn with replacement.

    Args:
        sums: per cluster (C), e.g. differences of nats.
        counts: per cluster (C), e.g. tokens.
        resamples: R.
        seed: of the draws.
    """
    import numpy as np

    sums_C, counts_C = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    random = np.random.default_rng(seed)
    at_once = max(1, _ELEMENTS_AT_ONCE // len(sums_C))
    found = []
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn_RC = random.integers(len(sums_C), size=(rows, len(sums_C)))
        found.append(sums_C[drawn_RC].sum(1) / counts_C[drawn_RC].sum(1))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    return Interval(math.fsum(sums) / math.fsum(counts), float(low), float(high))


Pairs = Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]


def _paired_nll(pairs: Pairs, resamples: int, seed: int) -> Paired:
    tokens = sum(x["tokens"] for x, _ in pairs)
    a, b = (math.fsum(pair[side]["nll"] for pair in pairs) / tokens for side in (0, 1))
    rows = [(x, y["nll"] - x["nll"], x["tokens"]) for x, y in pairs if x["tokens"]]
    return _paired("ppl", False, (_exp(a), _exp(b)), rows, resamples, seed)


def _paired_credit(pairs: Pairs, resamples: int, seed: int) -> Paired:
    a, b = (math.fsum(pair[side]["correct"] for pair in pairs) / len(pairs) for side in (0, 1))
    rows = [(x, y["correct"] - x["correct"], 1) for x, y in pairs]
    return _paired("accuracy", True, (a, b), rows, resamples, seed)


def _paired(
    metric: str,
    higher: bool,
    values: tuple[float, float],
    rows: Sequence[tuple[Mapping[str, Any], float, int]],
    resamples: int,
    seed: int,
) -> Paired:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for item, difference, count in rows:
        # Items that were cut from one document are not independent of each other.
        key = str(item.get("document", item["id"]))
        sums[key] = sums.get(key, 0.0) + difference
        counts[key] = counts.get(key, 0) + count
    found = bootstrap_ratio(
        list(sums.values()), list(counts.values()), resamples=resamples, seed=seed
    )
    verdict = "no difference seen" if len(sums) > 1 else ONE_UNIT
    if len(sums) > 1 and (found.low > 0 or found.high < 0):
        verdict = "B is better" if (found.low > 0) == higher else "A is better"
    return Paired(metric, higher, *values, found, len(rows), len(sums), verdict)


def _mcnemar_of(pairs: Pairs) -> McNemar:
    right = [(x["correct"] == 1, y["correct"] == 1) for x, y in pairs]
    return mcnemar(sum(x and not y for x, y in right), sum(y and not x for x, y in right))


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    found = {name: [_get(r["conditions"], name) for r in (a, b)] for name in _NOTED}
    found["bits"] = [a["bits"], b["bits"]]
    return {name: values for name, values in found.items() if values[0] != values[1]}


def _get(conditions: Mapping[str, Any], field: str) -> Any:
    value: Any = conditions
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
