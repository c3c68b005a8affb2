"""Multiple choice against a loop over single tokens; ties; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.choices import Item, choices, read_items


def items() -> list[Item]:
    return [
        Item("w1 w2 w3", ("w4 w5", "w6", "w7 w8 w9"), 0, "x"),
        Item("w10", ("w11", "w12 w13"), 1, "y"),
        Item("w3 w3 w4 w50", ("w1", "w2", "w3", "w4"), 3, "x"),
        Item("w20 w21", ("w22 w23", "w24 w25"), 1, "y"),
    ]


def naive_score(model: Any, tokenizer: Any, question: str, choice: str) -> float:
    prefix = [0, *tokenizer(question)["input_ids"]]
    nats = []
    for token in tokenizer(choice)["input_ids"]:
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[0, -1].double()
        nats.append(torch.log_softmax(logits, -1)[token].item())
        prefix.append(token)
    return sum(nats) / len(nats)


def test_scores_are_the_mean_log_likelihood_of_the_choice(llama: Any, tokenizer: Any) -> None:
    result = choices(llama, tokenizer, items(), batch_tokens=32)
    right = []
    for item, row in zip(items(), result.scores, strict=True):
        expected = [naive_score(llama, tokenizer, item.question, c) for c in item.choices]
        assert row == pytest.approx(expected, rel=1e-5)
        right.append(float(max(range(len(expected)), key=expected.__getitem__) == item.answer))
    assert result.credit == tuple(right)
    assert result.accuracy == pytest.approx(sum(right) / 4)
    assert result.by_subject == {
        "x": pytest.approx((right[0] + right[2]) / 2),
        "y": pytest.approx((right[1] + right[3]) / 2),
    }
    spread = sum((r - result.accuracy) ** 2 for r in right) / 3
    assert result.stderr == pytest.approx(math.sqrt(spread / 4))


def test_batch_size_does_not_change_scores(llama: Any, tokenizer: Any) -> None:
    one = choices(llama, tokenizer, items(), batch_tokens=1)
    all_ = choices(llama, tokenizer, items(), batch_tokens=10_000)
    for a, b in zip(one.scores, all_.scores, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


def test_equal_choices_share_the_credit(llama: Any, tokenizer: Any) -> None:
    same = Item("w1 w2", ("w3", "w3", "w3", "w3"), 2)
    result = choices(llama, tokenizer, [same], batch_tokens=8)
    assert result.credit == (0.25,)
    assert result.n_ties == 1
    assert result.stderr is None


def test_one_space_joins_question_and_choice(demo_model: Path) -> None:
    """Also where either brings white space: the same tokens, so the same scores."""
    from transformers import AutoModelForCausalLM

    from fissile.eval.tokens import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(demo_model)
    forms = [
        Item("for i in", ("range(10):", "while:"), 0),
        Item("for i in ", ("range(10):", "while:"), 0),
        Item("for i in", (" range(10):", " while:"), 0),
    ]
    result = choices(model, tokenizer, forms)
    assert result.scores[0] == result.scores[1] == result.scores[2]
    assert result.credit == (1.0, 1.0, 1.0)
    # The space belongs to the choice: " range" is scored, not "range" after a space token.
    ids = tokenizer("for i in range(10):", add_special_tokens=False)["input_ids"]
    count = len(ids) - len(tokenizer("for i in", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([[0, *ids]])).logits[0].double().log_softmax(-1)
    spent = [logits[i, ids[i]].item() for i in range(len(ids) - count, len(ids))]
    assert result.scores[0][0] == pytest.approx(sum(spent) / count, rel=1e-5)


def test_long_questions_lose_their_beginning(llama: Any, tokenizer: Any) -> None:
    long = Item(" ".join(["w9"] * 200), ("w1 w2", "w3"), 0)
    short = Item(" ".join(["w9"] * 5), ("w1 w2", "w3"), 0)
    result = choices(llama, tokenizer, [long, short], context=8)
    assert result.scores[0][0] == pytest.approx(result.scores[1][0])
    with pytest.raises(UsageError, match="choice 0 has 2 tokens, the context holds 2"):
        choices(llama, tokenizer, [long], context=2)


def test_damaged_weights_name_the_item(broken_llama: Any, tokenizer: Any) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"item 'w1 w2 w3'.*NaN or infinite"):
        choices(broken_llama, tokenizer, items()[:1])


def test_items_are_read(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [
        {"question": "q", "choices": ["a", "b"], "answer": 1},
        {"question": "r", "choices": ["a", "b"], "answer": 0, "subject": "s", "split": "test"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_items(path) == [
        Item("q", ("a", "b"), 1, "all", 1),
        Item("r", ("a", "b"), 0, "s", 2),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, r':1: field "question"'),
        ({"choices": ["a"]}, r':1: field "choices" must list at least two'),
        ({"choices": ["a", " "]}, r':1: field "choices"'),
        ({"choices": "ab"}, r':1: field "choices"'),
        ({"answer": 2}, r'field "answer" must be an index from 0 to 1, found 2'),
        ({"answer": True}, r'field "answer"'),
        ({"answer": "a"}, r'field "answer"'),
        ({"subject": 3}, r'field "subject"'),
    ],
)
def test_bad_items_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({"question": "q", "choices": ["a", "b"], "answer": 1} | change))
    with pytest.raises(UsageError, match=message):
        read_items(path)
