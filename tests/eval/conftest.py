"""A tokenizer, models and text small enough to check by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fissile.eval.corpus import Corpus, build_corpus
from fissile.eval.documents import Document

WORDS = [f"w{i}" for i in range(60)]
COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """One token per word: <s> 0, </s> 1, <unk> 2, w0 3, w1 4, …"""
    vocab = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**COMMON)).eval()


@pytest.fixture(scope="session")
def llama() -> Any:
    """A random model whose predictions are far from uniform; do not change it."""
    return make_llama()


@pytest.fixture
def broken_llama() -> Any:
    """A model with a NaN in its last norm."""
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    return model


@pytest.fixture(scope="session")
def gemma2() -> Any:
    """A random model whose logits are soft-capped after the head."""
    torch.manual_seed(0)
    config = Gemma2Config(**COMMON, final_logit_softcapping=3.0, sliding_window=16)
    return Gemma2ForCausalLM(config).eval()


class Bare(torch.nn.Module):
    """A causal model with logits and nothing else that scoring could take apart."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="session")
def bare(gemma2: Any) -> Any:
    """The soft-capped model without its parts."""
    return Bare(gemma2).eval()


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., list[Document]]:
    """Random words in domains; lengths from 3 to 39 tokens."""

    def make(per_domain: int = 12, domains: str = "cab", seed: int = 0) -> list[Document]:
        rng = random.Random(seed)
        return [
            Document(" ".join(rng.choices(WORDS, k=rng.randrange(3, 40))), domain)
            for domain in domains
            for _ in range(per_domain)
        ]

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Labelled text of this installation; read-only."""
    return build_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def toy_folder(llama: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model as a dense folder; read-only."""
    folder = tmp_path_factory.mktemp("toy")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
