"""Paired comparison against scipy's tests and bootstrap, and the refusals."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fissile.errors import UsageError
from fissile.eval.compare import bootstrap_ratio, compare, mcnemar


def result(task: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    """A stored result; only what comparisons read."""
    conditions = {
        "task_version": 1,
        "context": 64,
        "bos": 0,
        "limit": None,
        "data": {"sha256": "d"},
        "model": {"sha256": "m"},
        "tokenizer_sha256": "t",
        "convention" if task == "perplexity" else "shots": "fissile" if task == "perplexity" else 0,
    }
    return {
        "schema_version": 1, "task": task, "bits": None, "conditions": conditions, "items": items,
    }  # fmt: skip


def texts(seed: int, shift: float, n: int = 60) -> dict[str, Any]:
    """Documents of two domains; the noise of `seed` around the same difficulty."""
    fixed, random = np.random.default_rng(0), np.random.default_rng(seed)
    tokens = fixed.integers(20, 400, n)
    level = fixed.normal(3, 1, n)
    nll = tokens * (level + random.normal(shift, 0.02, n))
    rows = [
        {"id": str(i), "domain": "ab"[i % 2], "nll": float(nll[i]), "tokens": int(tokens[i])}
        for i in range(n)
    ]
    return result("perplexity", rows)


def answers(seed: int, share: float, n: int = 400) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    rows = [
        {"id": str(i), "subject": "ab"[i % 2], "correct": float(right), "choice": 0, "answer": 0}
        for i, right in enumerate(random.random(n) < share)
    ]
    return result("choices", rows)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (3, 9), (12, 12), (40, 7), (480, 520)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    found = mcnemar(b, c)
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert found.p_value == pytest.approx(expected, rel=1e-9)
    assert found.method == "exact binomial"


@pytest.mark.parametrize(("b", "c"), [(600, 500), (700, 701), (551, 551)])
def test_mcnemar_of_many_pairs_is_chi_square(b: int, c: int) -> None:
    found = mcnemar(b, c)
    statistic = max(0, abs(b - c) - 1) ** 2 / (b + c)
    assert found.p_value == pytest.approx(stats.chi2.sf(statistic, 1), rel=1e-9)
    assert found.p_value == pytest.approx(stats.binomtest(b, b + c, 0.5).pvalue, abs=0.01)
    assert found.method.startswith("chi-square")


def test_interval_of_a_ratio_is_scipys() -> None:
    random = np.random.default_rng(3)
    counts = random.integers(10, 200, 80).astype(float)
    sums = counts * random.normal(1.0, 0.3, 80)
    found = bootstrap_ratio(sums.tolist(), counts.tolist(), resamples=20_000, seed=1)

    def ratio(s: Any, c: Any, axis: int = -1) -> Any:
        return s.sum(axis) / c.sum(axis)

    theirs = stats.bootstrap(
        (sums, counts), ratio, paired=True, method="percentile", n_resamples=20_000, rng=2
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    assert found.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert found.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_perplexities() -> None:
    a, b = texts(1, 0.0), texts(2, 0.03)
    found = compare(a, b, resamples=4000)
    total = sum(i["tokens"] for i in a["items"])
    nll_a, nll_b = (sum(i["nll"] for i in r["items"]) for r in (a, b))
    row = found.total
    assert (row.metric, row.higher_is_better) == ("ppl", False)
    assert row.a == pytest.approx(math.exp(nll_a / total))
    assert row.difference.value == pytest.approx((nll_b - nll_a) / total)
    assert row.difference.low < row.difference.value < row.difference.high
    assert row.verdict == "A is better"
    assert compare(b, a, resamples=4000).total.verdict == "B is better"
    assert set(found.groups) == {"a", "b"}
    assert found.groups["a"].items == 30
    assert found.mcnemar is None
    # The pairing: the interval is far narrower than the spread between documents allows alone.
    plain = stats.sem([i["nll"] / i["tokens"] for i in a["items"]])
    assert row.difference.high - row.difference.low < plain / 4


def test_the_same_noise_shows_no_difference() -> None:
    found = compare(texts(1, 0.0), texts(2, 0.0), resamples=4000).total
    assert found.verdict == "no difference seen"
    assert found.difference.low < 0 < found.difference.high
    again = compare(texts(1, 0.0), texts(2, 0.0), resamples=4000).total
    assert again == found
    other = compare(texts(1, 0.0), texts(2, 0.0), resamples=4000, seed=9).total
    assert other.difference.low != found.difference.low


def test_accuracies() -> None:
    a, b = answers(1, 0.5), answers(2, 0.7)
    found = compare(a, b, resamples=4000)
    right = [[i["correct"] for i in r["items"]] for r in (a, b)]
    assert found.total.difference.value == pytest.approx(np.mean(right[1]) - np.mean(right[0]))
    assert found.total.verdict == "B is better"
    assert found.total.higher_is_better
    assert compare(b, a, resamples=4000).total.verdict == "A is better"
    assert found.mcnemar is not None
    only_a = sum(x > y for x, y in zip(*right, strict=True))
    only_b = sum(x < y for x, y in zip(*right, strict=True))
    assert (found.mcnemar.only_a, found.mcnemar.only_b) == (only_a, only_b)
    expected = stats.binomtest(only_a, only_a + only_b).pvalue
    assert found.mcnemar.p_value == pytest.approx(expected)
    # The normal approximation of a paired difference, which many items come near to.
    difference = np.subtract(right[1], right[0])
    half = 1.96 * stats.sem(difference)
    assert found.total.difference.high == pytest.approx(difference.mean() + half, abs=0.01)


def test_a_shared_highest_score_is_not_right_in_mcnemar() -> None:
    a, b = answers(1, 1.0, 4), answers(1, 1.0, 4)
    b["items"][0]["correct"] = 0.5
    found = compare(a, b, resamples=10)
    assert found.mcnemar is not None
    assert (found.mcnemar.only_a, found.mcnemar.only_b) == (1, 0)


def test_items_of_one_document_are_drawn_together() -> None:
    a, b = answers(1, 0.5, 200), answers(2, 0.55, 200)
    for i in range(200):
        # Twenty items that go the same way come from one document.
        a["items"][i]["document"] = b["items"][i]["document"] = i // 20
        b["items"][i]["correct"] = float(i // 20 % 3 > 0)
    clustered = compare(a, b, resamples=4000).total
    for i in range(200):
        del a["items"][i]["document"], b["items"][i]["document"]
    single = compare(a, b, resamples=4000).total
    assert (clustered.clusters, single.clusters) == (10, 200)
    widths = [r.difference.high - r.difference.low for r in (clustered, single)]
    assert widths[0] > 1.7 * widths[1]


def test_a_single_document_says_nothing() -> None:
    a, b = texts(1, 0.0, 1), texts(2, 0.5, 1)
    assert compare(a, b, resamples=50).total.verdict == "one document cannot tell"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("task",), "choices", "task is 'perplexity' in A, 'choices' in B"),
        (("conditions", "data", "sha256"), "e", r"data\.sha256 is 'd' in A, 'e' in B"),
        (("conditions", "context"), 32, "context is 64 in A, 32 in B"),
        (("conditions", "convention"), "gptq", "convention is 'fissile' in A, 'gptq' in B"),
        (("conditions", "shots"), 5, "shots is None in A, 5 in B"),
        (("conditions", "template_sha256"), "x", "template_sha256"),
        (("conditions", "tokenizer_sha256"), "u", "tokenizer_sha256 is 't' in A, 'u' in B"),
        (("items",), [], "items are missing in B"),
        (("items", 3, "tokens"), 1, r"tokens of item '3' is \d+ in A, 1 in B"),
        (("items", 5, "id"), "x", "id of item '5' is '5' in A, 'x' in B"),
    ],
)
def test_what_does_not_pair_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    a = texts(1, 0.0)
    b = copy.deepcopy(a)
    node = b
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(UsageError, match=f"not comparable: {message}"):
        compare(a, b)


def test_command(tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps(texts(1, 0.0)))
    b.write_text(json.dumps(texts(2, 0.03) | {"bits": 3}))
    code, out, _ = run_cli("compare", a, b, "--resamples", "500")
    assert code == 0
    assert "ppl, lower is better" in out
    assert out.count("A is better") == 3
    assert "differs in: bits" in out
    code, out, _ = run_cli("compare", a, b, "--json", "--resamples", "500")
    found = json.loads(out)
    assert found["total"]["verdict"] == "A is better"
    assert found["differs"] == {"bits": [None, 3]}
    a.write_text(json.dumps(answers(1, 0.5)))
    b.write_text(json.dumps(answers(2, 0.5)))
    code, out, _ = run_cli("compare", a, b, "--resamples", "500")
    assert "McNemar, exact binomial" in out
    assert "no difference seen" in out
    b.write_text(json.dumps(texts(2, 0.0)))
    code, out, err = run_cli("compare", a, b)
    assert (code, out) == (2, "")
    assert err == "fissile: error: not comparable: task is 'choices' in A, 'perplexity' in B\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ('{"ppl": 3}', "schema_version None, 1 is read"),
        ('{"schema_version": 1, "task": "x", "conditions": {}}', "no result"),
    ],
)
def test_files_that_are_no_results(
    text: str | None, message: str, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    code, _, err = run_cli("compare", path, path)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
