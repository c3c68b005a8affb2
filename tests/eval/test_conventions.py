"""Perplexity conventions: against lm-evaluation-harness itself and the GPTQ script's sums."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fissile.errors import UsageError
from fissile.eval.conventions import rolling_windows, score
from fissile.eval.documents import Document
from fissile.eval.result import read_result
from fissile.eval.tokens import load_tokenizer

Make = Callable[..., list[Document]]


@pytest.fixture
def with_bos(tokenizer: Any) -> Any:
    """The tokenizer with a BOS that it adds by itself, as Llama's."""
    import copy

    own = copy.deepcopy(tokenizer)
    own._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.bos_token_id)]
    )
    return own


def gptq_script(model: Any, tokenizer: Any, texts: list[str], seqlen: int) -> float:
    """What the paper's script computes, from the model's own loss."""
    ids = torch.tensor([tokenizer("\n\n".join(texts))["input_ids"]])
    windows = ids.numel() // seqlen
    total = 0.0
    for i in range(windows):
        window = ids[:, i * seqlen : (i + 1) * seqlen]
        with torch.no_grad():
            total += model(input_ids=window, labels=window).loss.item() * seqlen
    return math.exp(total / (windows * seqlen))


@pytest.mark.parametrize("bos", [False, True])
def test_gptq_is_the_scripts_number(
    llama: Any, tokenizer: Any, with_bos: Any, make_documents: Make, bos: bool
) -> None:
    own, documents = with_bos if bos else tokenizer, make_documents(per_domain=6)
    found = score(llama, own, documents, convention="gptq", context=16)
    texts = [d.text for d in documents]
    assert found.ppl == pytest.approx(gptq_script(llama, own, texts, 16), rel=1e-5)
    assert found.convention == "gptq"
    for domain, value in found.by_domain.items():
        texts = [d.text for d in documents if d.domain == domain]
        assert value.ppl == pytest.approx(gptq_script(llama, own, texts, 16), rel=1e-5)
        assert value.n_tokens % 15 == 0
    assert set(found.by_domain) == set("abc")
    # What comparisons pair over: windows of the whole, then those of each domain alone.
    items = found.scored().items
    assert sum(i["tokens"] for i in items if i["domain"] is None) == found.n_tokens
    of_a = [i for i in items if i["domain"] == "a"]
    mean = sum(i["nll"] for i in of_a) / sum(i["tokens"] for i in of_a)
    assert math.exp(mean) == pytest.approx(found.by_domain["a"].ppl)
    assert len({i["id"] for i in items}) == len(items)


def test_gptq_needs_a_whole_window(llama: Any, tokenizer: Any, make_documents: Make) -> None:
    documents = make_documents(per_domain=1)
    with pytest.raises(UsageError, match=r"domain '\w?' has \d+ tokens, a window has 64"):
        score(llama, tokenizer, documents, convention="gptq")


def harness(model: Any, tokenizer: Any, documents: list[Document], context: int) -> Any:
    """Log-likelihood of every document, nats, by the harness."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=context, batch_size=1)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(d.text,), idx=i)
        for i, d in enumerate(documents)
    ]
    return lm.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.mark.parametrize("bos", [False, True])
def test_rolling_is_the_harness(
    llama: Any, tokenizer: Any, with_bos: Any, make_documents: Make, bos: bool
) -> None:
    own, documents = with_bos if bos else tokenizer, make_documents(per_domain=3)
    found = score(llama, own, documents, convention="lm-eval", context=10)
    theirs = harness(llama, own, documents, 10)
    assert found.document_nll == pytest.approx([-v for v in theirs], rel=1e-5)
    metrics = found.scored().metrics
    size = sum(len(d.text.encode()) for d in documents)
    words = sum(len(re.split(r"\s+", d.text)) for d in documents)
    total = -sum(theirs)
    expected = {
        "word_perplexity": math.exp(total / words),
        "byte_perplexity": math.exp(total / size),
        "bits_per_byte": total / size / math.log(2),
    }
    assert {k: v["value"] for k, v in metrics.items()} == pytest.approx(expected, rel=1e-5)
    of_a = [i for i, d in enumerate(documents) if d.domain == "a"]
    bits = -sum(theirs[i] for i in of_a) / math.log(2)
    size = sum(len(documents[i].text.encode()) for i in of_a)
    assert metrics["bits_per_byte"]["by_domain"]["a"] == pytest.approx(bits / size, rel=1e-5)


def test_rolling_windows_at_every_length() -> None:
    """Against the harness's generator: what goes in, and what is predicted."""
    utils = pytest.importorskip("lm_eval.utils")
    for length in range(1, 40):
        for context in (2, 3, 7, 16):
            ids = [random.Random(length).randrange(9) for _ in range(length)]
            pairs = utils.get_rolling_token_windows(ids, -1, context, 1)
            theirs = [utils.make_disjoint_window(pair) for pair in pairs]
            ours = rolling_windows(ids, -1, context)
            assert [list(w.ids[-w.predicted :]) for w in ours] == [b for _, b in theirs]
            # The harness feeds the last `context` tokens of context and continuation but one.
            fed = [(a + b)[-(context + 1) :][:-1] for a, b in theirs]
            assert [list(w.ids[:-1]) for w in ours] == fed


def test_the_trained_model_at_its_longest_context(demo_model: Path) -> None:
    """The default context is the model's own maximum; all of it is read at once."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(demo_model)
    text = Path(json.__file__).read_text(encoding="utf-8")
    documents = [Document(text[:5000]), Document(text[9000:9400])]
    found = score(model, tokenizer, documents, convention="lm-eval")
    assert found.context == model.config.max_position_embeddings
    theirs = harness(model, tokenizer, documents, found.context)
    assert found.document_nll == pytest.approx([-v for v in theirs], rel=1e-4)
    joined = score(model, tokenizer, documents, convention="gptq", context=128)
    texts = [d.text for d in documents]
    assert joined.ppl == pytest.approx(gptq_script(model, tokenizer, texts, 128), rel=1e-4)
    own = score(model, tokenizer, documents).scored().metrics["bits_per_byte"]["value"]
    rolled = found.scored().metrics["bits_per_byte"]["value"]
    # The two differ by the few tokens that only one of them predicts.
    assert own == pytest.approx(rolled, rel=0.03)
    assert 0.5 < own < 2.5


def test_bits_per_byte_of_whole_documents(llama: Any, tokenizer: Any, make_documents: Make) -> None:
    """Where each document is one window, nothing is left unpredicted and bits are plain."""
    documents = make_documents(per_domain=4)
    found = score(llama, tokenizer, documents)
    bits = sum(found.document_nll) / math.log(2)
    size = sum(len(d.text.encode()) for d in documents)
    assert found.total.metrics()["bits_per_byte"] == pytest.approx(bits / size)
    cut = score(llama, tokenizer, documents, context=8).total
    # Of cut documents, the predicted tokens stand for all.
    per_token = math.log(cut.ppl) / math.log(2)
    tokens = sum(len(tokenizer(d.text)["input_ids"]) for d in documents)
    assert cut.metrics()["bits_per_byte"] == pytest.approx(per_token * tokens / size)


def test_command_stores_the_items(
    toy_folder: Path, make_documents: Make, tmp_path: Path, run_cli: Callable[..., Any]
) -> None:
    data, out = tmp_path / "text.jsonl", tmp_path / "sub" / "r.json"
    data.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in make_documents(2)))
    words = ["eval", toy_folder, "--task", "perplexity", "--data", data, "--json", "--context", "9"]
    code, stdout, _ = run_cli(*words, "--convention", "lm-eval", "--out", out)
    printed, stored = json.loads(stdout), read_result(out)
    assert code == 0
    assert "items" not in printed
    assert stored.pop("items")[0].keys() == {"id", "domain", "nll", "tokens"}
    assert stored == printed
    assert stored["conditions"]["convention"] == "lm-eval"
    code, stdout, _ = run_cli(*words, "--items")
    assert len(json.loads(stdout)["items"]) == 6
    code, _, err = run_cli(*words, "--convention", "gtpq")
    assert (code, "did you mean 'gptq'" in err) == (2, True)
