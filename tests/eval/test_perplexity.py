"""Perplexity against a loop over single tokens and against the model's own loss."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval import scoring
from fissile.eval.documents import Document
from fissile.eval.perplexity import measure, perplexity, prepare
from fissile.eval.tokens import load_tokenizer

Make = Callable[..., list[Document]]


def naive(model: Any, tokenizer: Any, documents: list[Document], context: int) -> list[list[float]]:
    """Nats of every predicted token per document: one forward pass per token, nothing shared."""
    found = []
    for document in documents:
        ids = [0, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        nats = []
        for position in range(1, len(ids)):
            first = position // context * context
            if position == first:
                continue  # first token of a later window
            with torch.no_grad():
                logits = model(torch.tensor([ids[first:position]])).logits[0, -1].double()
            nats.append(-torch.log_softmax(logits, -1)[ids[position]].item())
        found.append(nats)
    return found


@pytest.mark.parametrize("name", ["llama", "gemma2", "bare"])
def test_equals_a_loop_over_single_tokens(
    name: str, request: pytest.FixtureRequest, tokenizer: Any, make_documents: Make
) -> None:
    model, documents = request.getfixturevalue(name), make_documents(per_domain=1)
    inner = getattr(model, "inner", model)
    nats = naive(inner, tokenizer, documents, context=10)
    result = perplexity(model, tokenizer, documents, context=10, batch_tokens=64)
    flat = [v for row in nats for v in row]
    assert result.n_tokens == len(flat)
    assert result.ppl == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)
    for domain in "abc":
        part = [
            v for row, d in zip(nats, documents, strict=True) if d.domain == domain for v in row
        ]
        assert result.by_domain[domain].ppl == pytest.approx(
            math.exp(sum(part) / len(part)), rel=1e-5
        )
        assert result.by_domain[domain].n_tokens == len(part)
    assert result.document_nll == pytest.approx([sum(row) for row in nats], rel=1e-4)


def test_one_window_equals_the_models_own_loss(llama: Any, tokenizer: Any) -> None:
    document = Document(" ".join(f"w{i % 60}" for i in range(0, 250, 7)))
    ids = torch.tensor([[0, *tokenizer(document.text)["input_ids"]]])
    with torch.no_grad():
        loss = llama(input_ids=ids, labels=ids).loss.item()
    result = perplexity(llama, tokenizer, [document])
    assert math.log(result.ppl) == pytest.approx(loss, rel=1e-5)
    assert result.stderr is None
    assert result.context == 64


@pytest.mark.parametrize("name", ["llama", "gemma2", "bare"])
def test_batch_size_does_not_change_the_result(
    name: str, request: pytest.FixtureRequest, tokenizer: Any, make_documents: Make
) -> None:
    model, documents = request.getfixturevalue(name), make_documents(per_domain=6)
    results = [
        perplexity(model, tokenizer, documents, context=16, batch_tokens=size).document_nll
        for size in (1, 40, 100_000)
    ]
    assert results[1] == pytest.approx(results[0], rel=2e-5)
    assert results[2] == pytest.approx(results[0], rel=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_logits_exist_in_chunks_only(
    name: str,
    request: pytest.FixtureRequest,
    tokenizer: Any,
    make_documents: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = request.getfixturevalue(name)
    whole = perplexity(model, tokenizer, make_documents(), batch_tokens=2000)
    sizes: list[int] = []

    def watch(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        sizes.append(output.numel())

    monkeypatch.setattr(scoring, "_CHUNK_ELEMENTS", 64 * 7)
    handle = model.lm_head.register_forward_hook(watch)
    try:
        chunked = perplexity(model, tokenizer, make_documents(), batch_tokens=2000)
    finally:
        handle.remove()
    # The first output is the probe of eight tokens that finds out how the head is applied.
    assert sizes[0] <= 64 * 8
    assert max(sizes[1:]) <= 64 * 8
    assert len(sizes) > 50
    assert chunked.document_nll == pytest.approx(whole.document_nll, rel=1e-5)


def test_a_head_that_is_not_understood_is_not_taken_apart(
    llama: Any, tokenizer: Any, make_documents: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that scales its logits in a way of its own (Granite, Cohere) is scored as it is."""
    documents = make_documents(per_domain=1)
    plain = llama.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits / 3
        return output

    monkeypatch.setattr(llama, "forward", scaled)
    result = perplexity(llama, tokenizer, documents, context=10)
    flat = [v for row in naive(llama, tokenizer, documents, 10) for v in row]
    assert result.ppl == pytest.approx(math.exp(sum(flat) / len(flat)), rel=1e-5)


def test_limit_tokens_and_seed(llama: Any, tokenizer: Any, make_documents: Make) -> None:
    documents = make_documents(per_domain=10)
    first = perplexity(llama, tokenizer, documents, limit=10)
    assert list(first.by_domain) == ["c"]
    assert first.n_documents == 10
    budget = prepare(llama.config, tokenizer, documents, tokens=90, context=16)
    read = {d: 0 for d in "abc"}
    for window in budget.windows:
        read[budget.documents[window.document].domain] += len(window.ids)
    starts = {d: sum(x.domain == d for x in budget.documents) for d in "abc"}
    # 30 tokens a domain, and one start token a document; a last window of one token is dropped.
    assert all(30 - starts[d] <= read[d] - starts[d] <= 30 for d in "abc")
    again = prepare(llama.config, tokenizer, documents, tokens=90, context=16)
    other = prepare(llama.config, tokenizer, documents, tokens=90, context=16, seed=1)
    assert again.windows == budget.windows
    assert other.windows != budget.windows


def test_paired_comparison_of_two_models(
    llama: Any, gemma2: Any, tokenizer: Any, make_documents: Make
) -> None:
    held_out = prepare(llama.config, tokenizer, make_documents())
    a, b = measure(llama, held_out), measure(gemma2, held_out)
    ratio, error = a.log_ratio(b)
    assert ratio == pytest.approx(math.log(a.ppl / b.ppl))
    assert error is not None
    assert a.log_ratio(a) == (0.0, 0.0)
    shorter = perplexity(llama, tokenizer, make_documents(), limit=5)
    with pytest.raises(ValueError, match="different documents"):
        a.log_ratio(shorter)


def test_damaged_weights_name_the_document(
    broken_llama: Any, tokenizer: Any, make_documents: Make
) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"document at .*NaN or infinite logits"):
        perplexity(broken_llama, tokenizer, make_documents(per_domain=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context 1: a window needs at least 2"),
        ({"context": 65}, "context 65: the model's maximum is 64"),
        ({"limit": 0}, "limit 0"),
        ({"tokens": 2}, "tokens 2: fewer than the 3 domains"),
    ],
)
def test_wrong_settings_are_refused(
    llama: Any, tokenizer: Any, make_documents: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        perplexity(llama, tokenizer, make_documents(per_domain=1), **options)


def test_text_without_tokens_is_refused(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="the text is empty"):
        perplexity(llama, tokenizer, [Document("  ")])


def test_the_trained_model_predicts_text(demo_model: Path) -> None:
    """The shipped model is far better than chance (8192) and than its own words shuffled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    words = source[:6000].split(" ")
    shuffled = " ".join(words[i * 7919 % len(words)] for i in range(len(words)))
    tokenizer = load_tokenizer(demo_model)
    good = perplexity(model, tokenizer, [Document(source[:6000])], context=256)
    bad = perplexity(model, tokenizer, [Document(shuffled)], context=256)
    assert good.ppl < 60
    assert bad.ppl > 2 * good.ppl
