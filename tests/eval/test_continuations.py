"""Items cut from text: splits, units, the command, and a trained model against chance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.errors import UsageError
from fissile.eval.choices import choices, read_items
from fissile.eval.compare import compare
from fissile.eval.continuations import build_choices
from fissile.eval.corpus import Corpus
from fissile.eval.documents import read_documents, read_rows
from fissile.eval.result import read_result
from fissile.eval.tokens import load_tokenizer


@pytest.fixture
def text(corpus: Corpus) -> Path:
    """Held-out text of this installation."""
    return corpus.heldout


def test_splits_are_cut_from_different_documents(text: Path, tmp_path: Path) -> None:
    path = build_choices(text, tmp_path / "c.jsonl", items_per_domain=30, shots=4)
    rows = [row for _, row in read_rows(path)]
    lines = {d.line: d for d in read_documents(text)}
    owners: dict[str, set[int]] = {"dev": set(), "test": set()}
    for row in rows:
        own = lines[row["document"]]
        assert own.domain == row["subject"]
        assert row["question"] + row["choices"][row["answer"]] in own.text
        wrong = [c for i, c in enumerate(row["choices"]) if i != row["answer"]]
        assert not any(row["question"] + choice in own.text for choice in wrong)
        owners[row["split"]].add(row["document"])
    assert not owners["dev"] & owners["test"]
    counts = {(r["subject"], r["split"]) for r in rows}
    for subject, split in counts:
        found = [r for r in rows if (r["subject"], r["split"]) == (subject, split)]
        assert len(found) == (4 if split == "dev" else 30)
    assert len({(r["document"], r["question"]) for r in rows}) == len(rows)
    items = read_items(path)
    assert len(items) == sum(r["split"] == "test" for r in rows)
    # Items spread over documents, which are the units of every interval.
    assert len({item.document for item in items}) > len(items) / 2


def test_more_items_than_the_text_has(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    body = [
        "".join(f"doc {i} has a line {j} that can be cut\n" for j in range(12)) for i in range(6)
    ]
    rows = ({"text": text, "domain": "d"} for text in body)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = build_choices(path, tmp_path / "o.jsonl", items_per_domain=8, shots=2)
    owners: dict[str, set[str]] = {"dev": set(), "test": set()}
    for _, row in read_rows(made):
        pieces = [choice.split()[1] for choice in row["choices"]]
        assert len(set(pieces)) == 4  # every piece from another document
        owners[row["split"]].add(pieces[row["answer"]])
    assert (len(owners["dev"]), len(owners["test"])) == (2, 4)
    assert not owners["dev"] & owners["test"]
    with pytest.raises(UsageError, match=r"domain 'd' has text for \d+ items, 500 are asked for"):
        build_choices(path, tmp_path / "o.jsonl", items_per_domain=500, shots=0)
    with pytest.raises(UsageError, match=r"has 6 documents .* 8 are needed"):
        build_choices(path, tmp_path / "o.jsonl", items_per_domain=5, shots=4)


def test_a_trained_model_is_well_above_chance(
    text: Path, demo_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = build_choices(text, tmp_path / "c.jsonl", items_per_domain=15)
    items, tokenizer = read_items(path), load_tokenizer(demo_model)
    found = {}
    for folder in (demo_model, tiny_model):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[folder] = choices(model, tokenizer, items, context=128)
    trained, random = found[demo_model], found[tiny_model]
    assert trained.stderr is not None
    assert trained.accuracy - 3 * trained.stderr > 0.25
    assert abs(random.accuracy - 0.25) < 0.17
    assert trained.accuracy > random.accuracy + 0.1


def test_one_file_serves_both_tasks_and_comparisons(
    text: Path, tiny_model: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    path = tmp_path / "items.jsonl"
    words = ["choices", "--data", text, "--out", path, "--items", "4", "--shots", "2"]
    code, out, _ = run_cli(*words, "--json")
    made = json.loads(out)
    assert code == 0
    assert set(made["by_subject"].values()) == {4}
    first = path.read_bytes()
    assert run_cli(*words)[0] == 0
    assert path.read_bytes() == first
    for task, more in (("choices", []), ("mmlu", ["--shots", "0"])):
        out = tmp_path / f"{task}.json"
        words = ["eval", tiny_model, "--task", task, "--data", path, "--out", out, *more]
        code, _, err = run_cli(*words)
        assert code == 0, err
        stored = read_result(out)
        assert stored["n_items"] == made["n_items"] == len(stored["items"])
        assert set(stored["by_subject"]) == set(made["by_subject"])
        same = compare(stored, stored, resamples=50)
        assert same.total.verdict == "no difference seen"
        assert same.total.difference.value == 0
    answers = [item["answer"] for item in read_result(tmp_path / "choices.json")["items"]]
    rows = [row for _, row in read_rows(path) if row["split"] == "test"]
    assert answers == [row["answer"] for row in rows]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shots", "-1"], "-1"),
        (["--out", "absent/c.jsonl"], "its folder does not exist"),
        (["--data", "absent.jsonl"], "cannot be read"),
    ],
)
def test_mistakes(
    words: list[str], message: str, text: Path, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    given = ["--data", str(text), "--out", str(tmp_path / "c.jsonl"), *words]
    code, _, err = run_cli("choices", *given)
    assert code == 2
    assert message in err
