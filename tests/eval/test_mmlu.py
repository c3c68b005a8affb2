"""MMLU by itself: aggregates, resuming, batch sizes, ties, refusals, the command."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fissile.errors import CorruptCheckpoint, Interrupted, UsageError
from fissile.eval.documents import rows_to_bytes
from fissile.eval.mmlu import MmluResult, mmlu
from fissile.eval.mmlu_data import MmluData, read_mmlu
from fissile.eval.mmlu_journal import Journal, remove_journal
from fissile.eval.mmlu_prompts import MmluItem, prefix_text, question_text
from fissile.eval.mmlu_set import build_mmlu
from fissile.eval.run import load_model, read_config
from fissile.eval.tokens import load_tokenizer
from fissile.eval.uncertainty import pooled_stderr

SUBJECTS = ("anatomy", "astronomy", "marketing")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three subjects of four, five and six questions, two examples each."""
    rng = random.Random(0)
    words = [str(n) for n in range(300)] + ["the", "of", "cat", "dog", "house", "tree"] * 20
    folder = tmp_path_factory.mktemp("small")
    for split, sizes in (("test", (4, 5, 6)), ("dev", (2, 2, 2))):
        rows = [
            {
                "question": " ".join(rng.choices(words, k=rng.randrange(3, 9))),
                "choices": [" ".join(rng.choices(words, k=rng.randrange(1, 4))) for _ in "abcd"],
                "answer": rng.randrange(4),
                "subject": subject,
            }
            for subject, size in zip(SUBJECTS, sizes, strict=True)
            for _ in range(size)
        ]
        (folder / f"{split}.jsonl").write_bytes(rows_to_bytes(rows))
    return folder


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    """The random model with the demo's tokenizer; its context is 128 tokens."""
    return load_model(tiny_model, read_config(tiny_model)), load_tokenizer(tiny_model)


def items_of(result: MmluResult) -> list[Any]:
    return list(result.scored().items)


def test_the_prompt_is_the_published_one() -> None:
    item = MmluItem(" What?\n", ("w", "x ", "y", "z"), 2, "high_school_biology", "")
    assert prefix_text("high_school_biology", [item], "letter") + question_text(item, "letter") == (
        "The following are multiple choice questions (with answers) about high school biology.\n\n"
        "What?\nA. w\nB. x \nC. y\nD. z\nAnswer: C\n\n"
        "What?\nA. w\nB. x \nC. y\nD. z\nAnswer:"
    )
    assert prefix_text("virology", [item], "continuation") == (
        "The following are questions (with answers) about virology.\n\n"
        "Question: What?\nAnswer: y\n\n"
    )


@pytest.mark.parametrize("scoring", ["letter", "continuation"])
def test_every_batch_size_gives_the_same_bits(
    loaded: tuple[Any, Any], small: Path, scoring: Any
) -> None:
    data = read_mmlu(small)
    found = [
        items_of(mmlu(*loaded, data, shots=2, scoring=scoring, batch_tokens=tokens))
        for tokens in (1, 100, 8192)
    ]
    assert found[0] == found[1] == found[2]
    limited = items_of(mmlu(*loaded, data, shots=2, scoring=scoring, limit=2))
    assert limited == [item for item in found[0] if item["id"][-2:] in ("/1", "/2")]


def test_values_are_those_of_whole_prompts(loaded: tuple[Any, Any], small: Path) -> None:
    """By hand: BOS and prompt, left-cut to the context, log-probability of a letter."""
    (model, tokenizer), data = loaded, read_mmlu(small)
    result = mmlu(model, tokenizer, data, shots=1, context=100)
    assert 0 < result.details["n_truncated"] < 15
    for item in items_of(result):
        subject, number = item["id"].split("/")
        question = data.test[subject][int(number) - 1]
        prompt = prefix_text(subject, data.dev[subject][:1], "letter")
        prompt += question_text(question, "letter")
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([[0, *ids][-100:]])).logits[0, -1].double()
        letters = [tokenizer(f" {x}", add_special_tokens=False)["input_ids"][0] for x in "ABCD"]
        expected = torch.log_softmax(logits, -1)[letters].tolist()
        assert item["loglikelihoods"] == pytest.approx(expected, rel=1e-5)
        assert item["correct"] == (expected.index(max(expected)) == question.answer)


def test_averages_and_standard_errors() -> None:
    """Pooled variance as lm-evaluation-harness has it; macro without weights."""
    correct = {"anatomy": [1, 0, 1, 1], "astronomy": [0, 0, 1], "marketing": [1, 1, 0, 0, 1]}
    outcomes = {
        s: [{"correct": float(c), "id": f"{s}/{n}"} for n, c in enumerate(values)]
        for s, values in correct.items()
    }
    scored = MmluResult(outcomes, {}).scored()
    sizes = [4, 3, 5]
    errors = [float(np.std(v, ddof=1) / np.sqrt(len(v))) for v in correct.values()]
    variance = sum((n - 1) * n * e**2 for n, e in zip(sizes, errors, strict=True)) / (12 - 3)
    assert scored.value == pytest.approx(7 / 12)
    assert scored.stderr == pytest.approx(np.sqrt(variance / 12))
    macro = scored.metrics["macro_accuracy"]
    assert macro["value"] == pytest.approx((3 / 4 + 1 / 3 + 3 / 5) / 3)
    assert macro["stderr"] == pytest.approx(np.sqrt(sum(e**2 for e in errors)) / 3)
    assert scored.metrics["accuracy (stem)"]["value"] == pytest.approx(4 / 7)
    assert scored.metrics["accuracy (other)"]["n_items"] == 5
    assert "accuracy (humanities)" not in scored.metrics
    assert pooled_stderr([0.1, None], [3, 1]) is None
    harness = pytest.importorskip("lm_eval.api.metrics")
    assert pooled_stderr(errors, sizes) == pytest.approx(
        harness.pooled_sample_stderr(errors, sizes)
    )


def test_the_first_of_equal_choices_wins(loaded: tuple[Any, Any], small: Path) -> None:
    data = read_mmlu(small)
    tied = [replace(i, choices=("7", "the cat", "7", "the cat")) for i in data.test["anatomy"]]
    result = mmlu(
        *loaded, MmluData({"anatomy": tied}, data.dev, ""), shots=0, scoring="continuation"
    )
    for item in items_of(result):
        values = item["loglikelihoods"]
        assert values[0] == values[2]
        assert values[1] == values[3]
        assert item["choice"] == (0 if values[0] > values[1] else 1)


def test_close_choices_are_scored_again_by_themselves(
    loaded: tuple[Any, Any], small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = read_mmlu(small)
    usual = mmlu(*loaded, data, shots=1)
    assert usual.details["n_close"] == 0
    monkeypatch.setattr("fissile.eval.mmlu._CLOSE", 1e6)
    again = mmlu(*loaded, data, shots=1)
    assert again.details["n_close"] == 15
    for a, b in zip(items_of(usual), items_of(again), strict=True):
        assert a["loglikelihoods"] == pytest.approx(b["loglikelihoods"], rel=1e-5)
        assert a["choice"] == b["choice"]


def test_resuming_scores_only_what_is_missing(
    loaded: tuple[Any, Any], small: Path, tmp_path: Path
) -> None:
    data, out, identity = read_mmlu(small), tmp_path / "out.json", {"shots": 1}
    whole = mmlu(*loaded, data, shots=1).scored()

    def stop(stage: str, done: int, total: int, detail: str) -> None:
        if done >= 9:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        mmlu(*loaded, data, shots=1, journal=Journal(out, identity, resume=False), progress=stop)
    journal = Journal(out, identity, resume=True)
    assert journal.load("anatomy") is not None
    assert journal.load("marketing") is None
    seen = []

    def note(stage: str, done: int, total: int, detail: str) -> None:
        seen.append((done, total, detail))

    resumed = mmlu(*loaded, data, shots=1, journal=journal, progress=note).scored()
    assert resumed == whole
    assert seen[0] == (4, 15, "anatomy")
    assert seen[-1] == (15, 15, "marketing")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    with pytest.raises(UsageError, match="cannot resume: shots was 1 and is 2"):
        Journal(out, {"shots": 2}, resume=True)
    assert Journal(out, identity, resume=False).load("anatomy") is None
    remove_journal(out)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_name_the_row(
    loaded: tuple[Any, Any], small: Path, tiny_model: Path
) -> None:
    model = load_model(tiny_model, read_config(tiny_model))
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CorruptCheckpoint, match=r"test\.jsonl:1: the model gives NaN"):
        mmlu(model, loaded[1], read_mmlu(small), shots=0)


def test_a_choice_longer_than_the_context_is_refused(loaded: tuple[Any, Any], small: Path) -> None:
    with pytest.raises(UsageError, match=r"jsonl:\d+: choice \d has \d+ tokens .* 1 to 2 can"):
        mmlu(*loaded, read_mmlu(small), shots=0, scoring="continuation", context=2)
    with pytest.raises(UsageError, match="context 129: accepted are 2 to 128"):
        mmlu(*loaded, read_mmlu(small), shots=0, context=129)
    with pytest.raises(UsageError, match="limit 0"):
        mmlu(*loaded, read_mmlu(small), shots=0, limit=0)


def test_the_command(
    tiny_model: Path, small: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "out.json"
    words = ["eval", tiny_model, "--task", "mmlu", "--data", small, "--shots", "1", "--json", "-q"]
    code, text, err = run_cli(*words, "--out", out)
    assert code == 0, err
    found, stored = json.loads(text), json.loads(out.read_text())
    assert [found["task"], found["n_items"], len(stored["items"])] == ["mmlu", 15, 15]
    assert set(found["by_subject"]) == set(SUBJECTS)
    conditions = found["conditions"]
    wanted = {
        "task_version", "shots", "scoring", "template_sha256", "harness_version", "bos", "context",
        "n_truncated", "batch_tokens", "limit", "seed", "code", "data", "model", "versions",
        "tokenizer_sha256", "dtype", "subjects",
    }  # fmt: skip
    assert wanted <= set(conditions)
    assert conditions["shots"] == 1
    assert list(tmp_path.iterdir()) == [out]
    # An interrupted run left a journal of the same conditions; all but the time is the same.
    (tmp_path / "out.json.journal").mkdir()
    assert run_cli(*words, "--out", out, "--resume")[0] == 0
    again = json.loads(out.read_text())
    assert {**again, "seconds": 0} == {**stored, "seconds": 0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "mmlu"], "--task mmlu needs --data"),
        (
            ["--task", "mmlu", "--data", "x", "--resume"],
            "--resume continues --task mmlu with --out",
        ),
        (["--task", "mmlu", "--data", "x", "--shots", "-1"], "is not a positive integer"),
        (["--task", "mmlu", "--data", "x", "--scoring", "word"], "not one of letter, continuation"),
        (["--task", "choices", "--data", "x", "--shots", "3"], "--shots is one of mmlu, not of"),
        (["--task", "mmlu", "--harness", "x"], "not allowed with argument"),
        (["--task", "mmlu", "--data", "absent"], "absent: no such file or folder"),
    ],
)
def test_mistakes_are_found_before_loading(
    tiny_model: Path,
    words: Sequence[str],
    message: str,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fissile.eval.run.load_model", lambda *_: pytest.fail("was loaded"))
    code, _, err = run_cli("eval", tiny_model, *words)
    assert code == 2
    assert message in err


def test_the_set_is_complete_and_deterministic(text_file: Path, tmp_path: Path) -> None:
    first = build_mmlu(text_file, tmp_path / "a", per_subject=36)
    second = build_mmlu(text_file, tmp_path / "b", per_subject=36)
    data = read_mmlu(first)
    assert data.sha256() == read_mmlu(second).sha256()
    assert data.sha256() != read_mmlu(build_mmlu(text_file, tmp_path / "c", seed=1)).sha256()
    assert (len(data.test), sum(map(len, data.test.values()))) == (57, 2052)
    data.check(5, "continuation")
    answers = [item.answer for items in data.test.values() for item in items]
    assert all(answers.count(letter) > 400 for letter in range(4))
