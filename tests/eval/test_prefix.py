"""Shared prefixes: the same values as whole sequences, the same bits for every batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fissile.eval.prefix import PrefixScorer, Row
from fissile.models import load
from fissile.models.modeling_fissile import FissileForCausalLM

VOCAB, LONGEST = 64, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.6,
    "pad_token_id": None,
}


@pytest.fixture(scope="module")
def qwen2() -> Any:
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()


@pytest.fixture(scope="module")
def longrope() -> Any:
    """Rotary angles that change once the input is longer than 40 tokens."""
    torch.manual_seed(2)
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40, **factors}
    shape = {**SHAPE, "original_max_position_embeddings": 40, "rope_parameters": rope}
    return Phi3ForCausalLM(Phi3Config(**shape)).eval()


@pytest.fixture(scope="module")
def routed(finished_run: Path) -> Any:
    """A pre-gating router chooses the experts; its keys and values are one more cache layer."""
    model = load(finished_run)
    assert model.config.routing is not None
    assert model.config.routing["kind"] == "pregate"
    return model


MODELS = ("llama", "gemma2", "qwen2", "longrope", "routed", "bare")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def make_rows(prefix: Sequence[int], seed: int = 0, count: int = 24) -> list[Row]:
    """Rows after a prefix; letters (one token, four ways), longer continuations, and strangers."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        size = rng.randrange(4, LONGEST - len(prefix) + 1)
        ids = [rng.randrange(3, VOCAB) for _ in range(size)]
        scored = 1 if number % 3 else rng.randrange(2, 4)
        tail = tuple(ids[size - scored + 1 :])
        last = rng.sample(range(3, VOCAB), 4)
        head = [] if number % 7 == 3 else list(prefix)
        own = tuple((*tail, token) for token in last)
        rows.append(Row((*head, *ids), own, len(head)))
    return rows


def whole(model: Any, row: Row) -> list[float]:
    """The definition: one sequence, no cache, no padding, float64 after the logits."""
    with torch.inference_mode():
        output = model(
            input_ids=torch.tensor([row.ids]),
            attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
            use_cache=False,
        )
    log_probs = torch.log_softmax(output.logits[0].double(), dim=-1)[-row.scored :]
    return [
        sum(float(log_probs[place, token]) for place, token in enumerate(tokens))
        for tokens in row.continuations
    ]


PREFIX = tuple(range(5, 35))


def test_values_are_those_of_whole_sequences(model: Any) -> None:
    rows = make_rows(PREFIX)
    found = dict(PrefixScorer(model, 200, LONGEST).loglikelihoods(rows))
    assert sorted(found) == list(range(len(rows)))
    for index, values in found.items():
        assert values == pytest.approx(whole(model, rows[index]), rel=2e-5, abs=2e-5), index


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "longrope"])
def test_values_are_the_same_bits_for_every_batch(
    name: str, request: pytest.FixtureRequest
) -> None:
    model, rows = request.getfixturevalue(name), make_rows(PREFIX, seed=3, count=40)
    by_size = [
        dict(PrefixScorer(model, tokens, LONGEST).loglikelihoods(rows))
        for tokens in (1, 70, 300, 100_000)
    ]
    # Not which rows there are either: each alone with one companion.
    pairs = dict(
        (first + index, values)
        for first in range(0, len(rows), 2)
        for index, values in PrefixScorer(model, 8192, LONGEST).loglikelihoods(
            rows[first : first + 2]
        )
    )
    assert by_size[0] == by_size[1] == by_size[2] == by_size[3]
    shared = [i for i in range(0, 40, 2) if rows[i].ids[:30] == rows[i + 1].ids[:30] == PREFIX]
    assert len(shared) > 10
    for i in shared:
        assert (pairs[i], pairs[i + 1]) == (by_size[0][i], by_size[0][i + 1])


def count_tokens(model: Any, rows: list[Row]) -> tuple[int, int]:
    """Tokens that went through the embedding, and positions that the head saw."""
    tokens, positions = [], []
    hooks = [
        model.get_input_embeddings().register_forward_hook(
            lambda _, inputs, __: tokens.append(inputs[0].numel())
        ),
        model.get_output_embeddings().register_forward_hook(
            lambda _, inputs, __: positions.append(inputs[0].numel() // inputs[0].shape[-1])
        ),
    ]
    scorer = PrefixScorer(model, 8192, LONGEST)
    with torch.inference_mode():
        scorer._probe(rows[0].ids)
    tokens.clear()
    positions.clear()
    list(scorer.loglikelihoods(rows))
    for hook in hooks:
        hook.remove()
    return sum(tokens), sum(positions)


@pytest.mark.parametrize("name", ["llama", "gemma2", "routed"])
def test_the_prefix_runs_once_and_the_head_on_scored_positions(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    rows = [Row((*PREFIX, *range(3, 11)), ((4,), (5,)), len(PREFIX)) for _ in range(12)]
    # Thirty tokens are padded to a multiple of eight, but not before a sliding window.
    prefix = len(PREFIX) if name == "gemma2" else len(PREFIX) + 2
    assert count_tokens(model, rows) == (prefix + 12 * 8, 16)
    whole_rows = [replace(row, shared=0) for row in rows]
    assert count_tokens(model, whole_rows) == (12 * (len(PREFIX) + 8 + 2), 16)


def test_prefixes_of_one_length_share_batches(model: Any) -> None:
    """Rows of six prefixes: the values of whole sequences, and the bits of each prefix alone."""
    prefixes = [tuple(range(first, first + 21)) for first in range(3, 9)]
    parts = [make_rows(prefix, seed=number) for number, prefix in enumerate(prefixes)]
    rows = [row for part in parts for row in part]
    scorer = PrefixScorer(model, 400, LONGEST)
    together = dict(scorer.loglikelihoods(rows))
    for index in range(0, len(rows), 5):
        expected = whole(model, rows[index])
        assert together[index] == pytest.approx(expected, rel=2e-5, abs=2e-5), index
    if isinstance(model, FissileForCausalLM):
        return  # the experts of a routed model work on as many rows as choose them
    apart = [dict(scorer.loglikelihoods(part)) for part in parts]
    assert [together[i] for i in range(len(rows))] == [
        found[i] for part, found in zip(parts, apart, strict=True) for i in range(len(part))
    ]


def test_padding_stays_within_the_context(llama: Any) -> None:
    """Learned positions end at the context: rows of 50 and 61 tokens take 52 and 64, or less."""
    rows = [Row(tuple(range(3, 53)), ((4,),)), Row((*range(3, 61), 5, 6, 7), ((4,),))]
    tokens, _ = count_tokens(llama, rows)
    assert tokens == 52 + 64
    short = PrefixScorer(llama, 8192, 61)
    assert short._padded(rows[1], 0) == 61


def test_a_length_dependent_rotary_embedding_is_not_shared(longrope: Any, llama: Any) -> None:
    assert PrefixScorer(llama, 100, LONGEST).shares
    assert not PrefixScorer(longrope, 100, LONGEST).shares
