"""Windows: every token predicted at most once, budgets split evenly, order seeded."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.documents import Document
from fissile.eval.windows import choose_documents, document_windows, sample_windows

Make = Callable[..., list[Document]]
BOS = 0


@pytest.mark.parametrize(("length", "context"), [(1, 2), (7, 8), (8, 8), (9, 4), (30, 7), (12, 5)])
def test_no_token_is_predicted_twice_and_windows_do_not_overlap(length: int, context: int) -> None:
    ids = list(range(100, 100 + length))
    windows = document_windows(ids, start=5, context=context)
    predicted = [token for w in windows for token in w.ids[1:]]
    assert len(set(predicted)) == len(predicted)
    assert 5 not in predicted
    # Not predicted: the first token of each window. A last window of one token is dropped.
    assert len(predicted) == length + 1 - -(-(length + 1) // context)
    read = [token for w in windows for token in w.ids]
    assert read == [5, *ids][: len(read)]
    assert length + 1 - len(read) <= 1
    assert all(2 <= len(w.ids) <= context for w in windows)


def test_an_empty_document_has_no_window() -> None:
    assert document_windows([], start=0, context=8) == []


def test_the_budget_is_split_evenly_and_seeded() -> None:
    documents = [Document("x", "ab"[i % 2]) for i in range(40)]
    lengths = [10] * 40
    chosen = choose_documents(documents, lengths, tokens=125, seed=1)
    per_domain = {d: sum(n for i, n in chosen.items() if documents[i].domain == d) for d in "ab"}
    assert per_domain == {"a": 63, "b": 62}
    assert list(chosen) == sorted(chosen)
    assert chosen == choose_documents(documents, lengths, tokens=125, seed=1)
    assert set(chosen) != set(choose_documents(documents, lengths, tokens=125, seed=2))


def test_a_poor_domain_gives_all_it_has() -> None:
    documents = [Document("x", "poor"), *[Document("x", "rich")] * 9]
    chosen = choose_documents(documents, [3] + [10] * 9, tokens=60, seed=0)
    assert chosen[0] == 3
    assert sum(chosen.values()) == 33
    with pytest.raises(UsageError, match="tokens 1: fewer than the 2 domains"):
        choose_documents(documents, [3] + [10] * 9, tokens=1, seed=0)


def test_calibration_windows_hold_the_text_in_order(tokenizer: Any, make_documents: Make) -> None:
    documents = make_documents()
    ids_NS, domain_N, names = sample_windows(documents, tokenizer, tokens=170, context=16, seed=3)
    assert ids_NS.shape == (10, 16)
    assert ids_NS.dtype == domain_N.dtype == torch.int64
    assert names == ["a", "b", "c"]
    assert domain_N.tolist() == [0] * 4 + [1] * 3 + [2] * 3
    assert (ids_NS[:, 0] == BOS).all()
    for place, name in enumerate(names):
        left = {tuple(tokenizer(d.text)["input_ids"]) for d in documents if d.domain == name}
        # Without start tokens, a domain's windows are whole documents and the start of one more.
        stream = tuple(t for t in ids_NS[domain_N == place].flatten().tolist() if t != BOS)
        while whole := [text for text in left if text == stream[: len(text)]]:
            left.remove(whole[0])
            stream = stream[len(whole[0]) :]
        assert any(text[: len(stream)] == stream for text in left)


def test_every_document_begins_after_a_start_token(tokenizer: Any, make_documents: Make) -> None:
    documents = make_documents(per_domain=30, domains="a")
    ids_NS = sample_windows(documents, tokenizer, tokens=320, context=32)[0]
    begins = {tokenizer(d.text)["input_ids"][0] for d in documents}
    after = {b for row in ids_NS for a, b in pairwise(row.tolist()) if a == BOS}
    assert not (ids_NS[:, 1:] == ids_NS[:, :-1])[ids_NS[:, 1:] == BOS].any()
    # A window's own start token may be followed by the middle of a document.
    assert len(after - begins) <= len(ids_NS)
    assert (ids_NS[:, 1:] == BOS).sum() >= 5


def test_calibration_windows_follow_the_seed(tokenizer: Any, make_documents: Make) -> None:
    documents = make_documents()
    one = sample_windows(documents, tokenizer, 160, 16, seed=1)[0]
    assert torch.equal(one, sample_windows(documents, tokenizer, 160, 16, seed=1)[0])
    assert not torch.equal(one, sample_windows(documents, tokenizer, 160, 16, seed=2)[0])


@pytest.mark.parametrize(
    ("per_domain", "tokens", "message"),
    [
        (0, 100, "calibration text is empty"),
        (12, 32, "32 calibration tokens make 2 windows of 16, fewer than the 3 domains"),
        (1, 3200, "domain 'a': its 1 documents fill . windows of 16 tokens, 67 are needed"),
    ],
)
def test_too_little_text_is_refused_with_numbers(
    tokenizer: Any, make_documents: Make, per_domain: int, tokens: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        sample_windows(make_documents(per_domain), tokenizer, tokens, 16, seed=0)


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: Any, make_documents: Make) -> None:
    config = LlamaConfig(vocab_size=20, bos_token_id=0)
    with pytest.raises(CorruptCheckpoint, match="vocabulary has 20"):
        sample_windows(make_documents(), tokenizer, 160, 16, config=config)
