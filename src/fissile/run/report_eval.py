"""The report's evaluations: gates, answers to items, and the result files in RUN/eval.

`fissile eval RUN --task … --out RUN/eval/NAME.json` stores a result there; a dense one on
the same data (`fissile eval MODEL …`) is what the others are compared with, pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import expm1
from pathlib import Path
from typing import Any

from fissile.errors import UsageError
from fissile.eval.compare import Comparison, bootstrap_ratio, check_comparable, compare
from fissile.eval.result import SCORES, read_result
from fissile.run.gates import AnswerScore, GateRow, served_name
from fissile.run.metrics import Metrics
from fissile.run.page import Column, Html, Text, mark, paragraph, table

NONE = "\u2013"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Stored:
    """One file of RUN/eval.

    Args:
        file: its name.
        result: its contents, None if it cannot be read.
        problem: why it cannot be read.
        against: comparison with the dense model's result, where there is one that pairs.
    """

    file: str
    result: dict[str, Any] | None
    problem: str = ""
    against: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the items."""
        kept = {k: v for k, v in (self.result or {}).items() if k != "items"}
        against = None if self.against is None else self.against.to_dict()
        return {"file": self.file, "problem": self.problem, **kept, "against_dense": against}


def stored_results(folder: Path) -> list[Stored]:
    """Every result in a run folder's eval/, by file name.

    Args:
        folder: the run folder.
    """
    found = [_read(path) for path in sorted((folder / "eval").glob("*.json"))]
    dense = [s.result for s in found if s.result is not None and is_dense(s.result)]
    return [_against_dense(stored, dense) for stored in found]


def is_dense(result: Mapping[str, Any]) -> bool:
    """Whether a result is of a model that this project did not convert."""
    return (result["conditions"].get("model") or {}).get("type") != "fissile"


def evaluation_data(metrics: Metrics, stored: Sequence[Stored]) -> dict[str, Any]:
    """What report.json holds under `evaluations`.

    Args:
        metrics: of the run.
        stored: from `stored_results`.
    """
    return {
        "gates": [gate.model_dump() for gate in metrics.gates],
        "choices": [
            {"model": name, "accuracy": score.accuracy, "stderr": score.stderr}
            for name, score in _answers(metrics)
        ],
        "results": [one.to_dict() for one in stored],
    }


def evaluation_parts(metrics: Metrics, stored: Sequence[Stored]) -> list[Html | None]:
    """The section's contents.

    Args:
        metrics: of the run.
        stored: from `stored_results`.
    """
    problems = [f"{one.file} was not read: {one.problem}" for one in stored if one.problem]
    return [
        gate_table(metrics.gates),
        answer_table(metrics),
        result_table(stored),
        *map(paragraph, problems),
    ]


def gate_table(gates: Sequence[GateRow]) -> Html | None:
    """Every gate of the recipe."""
    if not gates:
        return None
    rows: list[list[Text]] = [
        [gate.task, served_name(gate.model), mark(gate.ok), gate.detail] for gate in gates
    ]
    columns = [Column("task", ""), Column("model", ""), Column("", ""), Column("found", "wrap")]
    return table("Least recovery of the dense scores that the recipe asks for.", columns, rows)


def answer_table(metrics: Metrics) -> Html | None:
    """Accuracy on items cut from the held-out text, against the dense model's."""
    answers = list(_answers(metrics))
    if not answers:
        return None
    dense = metrics.dense.choices if metrics.dense is not None else None
    subjects = sorted({name for _, score in answers for name in score.by_subject})
    rows = [
        [
            name,
            _share(score.accuracy),
            NONE if score.stderr is None else _share(score.stderr),
            _difference(score, dense) if dense is not None and score is not dense else NONE,
            *(_share(score.by_subject.get(subject)) for subject in subjects),
        ]
        for name, score in answers
    ]
    columns = [Column("model", ""), Column("accuracy, %"), Column("± stderr")]
    columns += [Column("against dense, points"), *map(Column, subjects)]
    count = len(answers[0][1].credit)
    caption = (
        f"Which of four pieces continues a held-out text: {count} items, a blind guess has 25 %;"
        " higher is better. Differences have 95 % intervals, paired over documents."
    )
    return table(caption, columns, rows, key=0)


def result_table(stored: Sequence[Stored]) -> Html | None:
    """Every stored result, by task and width."""
    good = [one for one in stored if one.result is not None]
    if not good:
        return None
    rows = [_result_row(one) for one in sorted(good, key=_order)]
    columns = [
        Column("task", ""),
        Column("model", ""),
        Column("metric", ""),
        Column("value"),
        Column("± stderr"),
        Column("against dense"),
        Column("verdict", ""),
        Column("n"),
        Column("file", ""),
    ]
    caption = (
        "Results stored in eval/. Differences are paired over documents, with 95 % bootstrap"
        " intervals; per cent for perplexities (lower is better), points for accuracies (higher is"
        " better)."
    )
    return table(caption, columns, rows)


def _read(path: Path) -> Stored:
    try:
        return Stored(path.name, read_result(path))
    except UsageError as err:
        return Stored(path.name, None, str(err))


def _against_dense(stored: Stored, dense: Sequence[Mapping[str, Any]]) -> Stored:
    if stored.result is None or is_dense(stored.result):
        return stored
    for other in dense:
        if _pairs(other, stored.result):
            against = compare(other, stored.result, resamples=_RESAMPLES)
            return Stored(stored.file, stored.result, "", against)
    return stored


def _pairs(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    try:
        check_comparable(a, b)
    except UsageError:
        return False
    return "nll" in a["items"][0] or "correct" in a["items"][0]


def _answers(metrics: Metrics) -> Iterator[tuple[str, AnswerScore]]:
    if metrics.dense is not None and metrics.dense.choices is not None:
        yield "dense", metrics.dense.choices
    for width in sorted(metrics.widths, key=lambda w: -(w.bits or 99)):
        if width.choices is not None and width.of == "converted":
            yield served_name(str(width.bits or "float")), width.choices


def _difference(score: AnswerScore, dense: AnswerScore) -> str:
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for document, ours, theirs in zip(score.documents, score.credit, dense.credit, strict=True):
        sums[document] = sums.get(document, 0.0) + ours - theirs
        counts[document] = counts.get(document, 0) + 1
    found = bootstrap_ratio(
        list(sums.values()), list(counts.values()), resamples=_RESAMPLES, seed=0
    )
    ends = (found.value, found.low, found.high)
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * end for end in ends))


def _order(stored: Stored) -> tuple[Any, ...]:
    result = stored.result or {}
    convention = result["conditions"].get("convention") or ""
    return result["task"], convention, not is_dense(result), -(result["bits"] or 99), stored.file


def _result_row(stored: Stored) -> list[Text]:
    result = stored.result or {}
    convention = result["conditions"].get("convention")
    metric = SCORES.get(result["task"], "accuracy")
    model = "dense" if is_dense(result) else served_name(str(result["bits"] or "float"))
    count = result.get("n_tokens", result.get("n_items"))
    return [
        result["task"] + (f" ({convention})" if convention else ""),
        model,
        metric,
        _plain(result.get(metric)),
        _plain(result.get("stderr")),
        _change(stored.against) if stored.against is not None else NONE,
        stored.against.total.verdict.replace("A is", "dense is").replace("B is", "this is")
        if stored.against is not None
        else NONE,
        f"{count:,}",
        stored.file,
    ]


def _change(found: Comparison) -> str:
    row = found.total
    ends = (row.difference.value, row.difference.low, row.difference.high)
    points = row.higher_is_better
    value, low, high = (100 * (end if points else expm1(end)) for end in ends)
    return f"{value:+.1f} {'points' if points else '%'} [{low:+.1f}, {high:+.1f}]"


def _plain(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{100 * value:.1f}"
