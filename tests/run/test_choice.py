"""Speed by formula against numbers worked out by hand, gaps, and the choice between models."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from fissile.config import Recipe
from fissile.families import FAMILIES
from fissile.run.choice import Option, choose, frontier, options
from fissile.run.gap import gap_closed, oracle_of, variant_gap
from fissile.run.metrics import Metrics, Score, find_variant, parse_metrics, weights_of
from fissile.run.metrics_routing import Division, Weights
from fissile.run.speed import (
    ffn_share_of_arithmetic,
    ffn_share_of_bytes,
    quantized_speedup,
    routed_speedup,
    speedup,
    static_speedup,
    touched_share,
)

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
TOKENS = [250 + 11 * i for i in range(30)]


def llama() -> Weights:
    return Weights(**weights_of(FAMILIES["llama"], LLAMA_3_8B))


def score(ppl: float, noise: float = 0.002, seed: int = 0) -> dict[str, Any]:
    spread, own = random.Random(0), random.Random(f"{ppl}/{seed}")
    nats = [math.log(ppl) + spread.gauss(0, 0.3) + own.gauss(0, noise) for _ in TOKENS]
    nll = [value * n for value, n in zip(nats, TOKENS, strict=True)]
    whole = math.exp(sum(nll) / sum(TOKENS))
    return {"ppl": whole, "document_nll": nll, "document_tokens": TOKENS}


def metrics(
    routed: float = 11.0,
    static: float = 12.0,
    quantized: float | None = 10.1,
    noise: float = 0.002,
    **more: Any,
) -> Metrics:
    variants = [
        {"name": name, "share": 0.5, "recovery": "refit", **score(ppl, noise, i)}
        for i, (name, ppl) in enumerate((("pregate", routed), ("static", static), ("oracle", 10.4)))
    ]
    half = (llama().ffn + llama().attention) // 2 + 2 * (llama().head + llama().embedding)
    row = {"method": "nested", "bits": 4, "bits_per_weight": 4.0, "bytes": half, "of": "dense"}
    return parse_metrics(
        {
            "name": "trial",
            "active_share": 0.5,
            "dense": score(10.0, 0.0),
            "variants": variants,
            "widths": [row | score(quantized, noise)] if quantized else [],
            "weights": llama().model_dump(),
            "divisions": [division().model_dump()],
            **more,
        },
        "here",
    )


def division(share: float = 0.5, shared: float = 0.25, top_k: int = 2, count: int = 6) -> Division:
    return Division(wanted=share, share=share, shared=shared, num_experts=count, top_k=top_k)


def test_weights_of_a_known_model() -> None:
    weights = llama()
    assert weights.ffn == 32 * 3 * 4096 * 14336
    assert weights.attention == 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024)
    assert weights.head == weights.embedding == 128256 * 4096
    assert weights.ffn + weights.attention + weights.head + weights.embedding == pytest.approx(
        8.03e9, rel=1e-3
    )
    tied = Weights(**weights_of(FAMILIES["llama"], {**LLAMA_3_8B, "tie_word_embeddings": True}))
    assert (tied.head, tied.embedding) == (weights.head, 0)
    assert ffn_share_of_bytes(tied) == ffn_share_of_bytes(weights)


def test_published_bounds_of_llama_3_8b() -> None:
    """phi near 0.75 of the bytes; 1.23, 1.6 and 2.3 times at a = 0.75, 0.5 and 0.25."""
    phi = ffn_share_of_bytes(llama())
    assert phi == pytest.approx(0.75, abs=0.005)
    found = [static_speedup(llama(), share, 1) for share in (0.75, 0.5, 0.25)]
    assert found == pytest.approx([1.23, 1.6, 2.3], abs=0.02)
    assert [speedup(0.75, a) for a in (0.75, 0.5, 0.25)] == pytest.approx([16 / 13, 1.6, 16 / 7])


def test_scores_of_attention_count_as_arithmetic() -> None:
    weights = Weights(ffn=600, attention=300, query=2, head=100, embedding=50)
    assert ffn_share_of_bytes(weights) == 0.6
    assert ffn_share_of_arithmetic(weights, 0) == 0.6
    assert ffn_share_of_arithmetic(weights, 250) == 0.4


@pytest.mark.parametrize(
    ("batch", "touched"),
    [(1, 0.5), (2, 0.25 + 0.75 * 5 / 9), (4, 0.25 + 0.75 * 65 / 81), (64, 1.0)],
)
def test_batches_touch_more_experts(batch: int, touched: float) -> None:
    """s = 1/4, two of six: half the FFN for one token, nearly all of it for 64."""
    assert touched_share(0.25, 1 / 3, batch) == pytest.approx(touched, abs=1e-9)
    weights = Weights(ffn=600, attention=300, head=100)
    expected = 1 / (1 - 0.6 * (1 - touched))
    assert routed_speedup(weights, division(), batch) == pytest.approx(expected)


def test_one_token_limited_by_memory_is_the_static_case() -> None:
    weights = Weights(ffn=600, attention=300, head=100)
    assert routed_speedup(weights, division(), 1) == pytest.approx(1 / 0.7)
    assert static_speedup(weights, 0.5, 64) == pytest.approx(1 / 0.7)
    assert routed_speedup(weights, division(), None) == pytest.approx(1 / 0.7)
    assert routed_speedup(weights, division(), 64) == pytest.approx(1.0, abs=1e-6)


def test_the_published_case_of_three_shared_of_eight() -> None:
    """S3A3E8: at batch 4 already 97 % of the routed experts are read."""
    chosen = 3 / 5
    assert 1 - (1 - chosen) ** 4 == pytest.approx(0.974, abs=1e-3)
    assert touched_share(3 / 8, chosen, 4) == pytest.approx(3 / 8 + 5 / 8 * 0.9744)


def test_quantized_weights_are_read_in_their_bits() -> None:
    weights = Weights(ffn=600, attention=300, head=100, embedding=40)
    loaded = 900 * 4 // 8 + 2 * 140
    expected = 2000 / (loaded - 80)
    assert quantized_speedup(weights, loaded, 4.0, None, 8) == pytest.approx(expected)
    assert quantized_speedup(weights, loaded, 4.0, None, None) == 1.0
    routed = quantized_speedup(weights, loaded, 4.0, division(), 1)
    assert routed == pytest.approx(2000 / (loaded - 80 - 150))
    assert quantized_speedup(weights, loaded, 4.0, division(), None) == pytest.approx(1 / 0.7)


def test_impossible_shares_are_refused() -> None:
    for call in (lambda: touched_share(0.5, 1.5, 1), lambda: touched_share(0.5, 0.5, 0)):
        with pytest.raises(ValueError, match="chosen"):
            call()
    for phi, remaining in ((1.0, 0.0), (1.2, 0.5), (0.5, -0.1)):
        with pytest.raises(ValueError, match="remaining"):
            speedup(phi, remaining)


# -- the oracle's gap --------------------------------------------------------------------------


def scores(*ppl: float, noise: float = 0.0) -> list[Score]:
    return [Score(**score(p, noise, i)) for i, p in enumerate(ppl)]


def test_gap_closed_is_a_share_of_log_perplexity() -> None:
    found = gap_closed(*scores(16.0, 8.0, 4.0))
    assert found is not None
    assert found.closed == pytest.approx(0.5)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    worse = gap_closed(*scores(16.0, 32.0, 4.0))
    assert worse is not None
    assert worse.closed == pytest.approx(-0.5)


def test_error_of_the_gap_is_that_of_many_draws() -> None:
    """The delta method's error against the spread over fresh documents."""
    drawn = []
    for seed in range(300):
        rng = random.Random(seed)
        rows = [[(math.log(p) + rng.gauss(0, 0.05)) * n for n in TOKENS] for p in (16.0, 10.0, 8.0)]
        found = gap_closed(
            *(
                Score(ppl=math.exp(sum(r) / sum(TOKENS)), document_nll=r, document_tokens=TOKENS)
                for r in rows
            )
        )
        assert found is not None
        assert found.error is not None
        drawn.append((found.closed, found.error))
    mean = sum(closed for closed, _ in drawn) / len(drawn)
    spread = math.sqrt(sum((closed - mean) ** 2 for closed, _ in drawn) / (len(drawn) - 1))
    assert mean == pytest.approx(math.log(1.6) / math.log(2), abs=0.01)
    assert sum(error for _, error in drawn) / len(drawn) == pytest.approx(spread, rel=0.15)


def test_error_of_the_gap_by_hand() -> None:
    """Documents of one token: gaps of 2 and 2, of which 1 + d and 1 - d are closed."""
    rows = [[4.0, 4.0], [3.25, 2.75], [2.0, 2.0]]
    found = gap_closed(
        *(Score(ppl=math.exp(sum(r) / 2), document_nll=r, document_tokens=[1, 1]) for r in rows)
    )
    assert found is not None
    assert found.closed == pytest.approx(0.5)
    # sqrt((0.25^2 + 0.25^2) * 2 / 1) over the whole gap of 4.
    assert found.error == pytest.approx(0.5 / 4)


def test_no_gap_without_an_oracle_that_is_clearly_better() -> None:
    assert gap_closed(*scores(16.0, 8.0, 15.99, noise=0.1)) is None
    assert gap_closed(*scores(16.0, 8.0, 17.0)) is None
    base, router, oracle = scores(16.0, 8.0, 4.0)
    alone = router.model_copy(update={"document_nll": [], "document_tokens": []})
    unpaired = gap_closed(base, alone, oracle)
    assert unpaired is not None
    assert (unpaired.closed, unpaired.error) == (pytest.approx(0.5), None)


def test_a_router_is_measured_by_the_oracle_of_its_own_experts() -> None:
    rows = [
        {"name": name, "share": 0.5, **score(ppl, 0.0)}
        for name, ppl in (
            ("static", 16.0), ("cmoe", 8.0), ("oracle", 4.0), ("oracle_layerwise", 2.0),
            ("ridge", 4.0), ("pregate", 8.0), ("spectral", 4.0), ("per_layer", 4.0),
        )
    ]  # fmt: skip
    found = parse_metrics({"name": "x", "variants": rows}, "here")

    def closed(name: str, base: Any = "static") -> float | None:
        variant = find_variant(found, name, 0.5, "none")
        assert variant is not None
        gap = variant_gap(found, variant, base)
        return gap.closed if gap else None

    assert closed("pregate") == pytest.approx(0.5)
    assert closed("per_layer") == pytest.approx(1.0)
    assert closed("ridge") == closed("spectral") == pytest.approx(2 / 3)
    assert closed("spectral", "cmoe") == pytest.approx(0.5)
    assert closed("cmoe") is closed("oracle") is closed("static") is None
    oracle = oracle_of(found, rows_variant(found, "ridge"))
    assert oracle is not None
    assert oracle.name == "oracle_layerwise"


def rows_variant(found: Metrics, name: str) -> Any:
    return next(v for v in found.variants if v.name == name)


# -- the choice --------------------------------------------------------------------------------


def texts(found: Metrics) -> dict[str, str]:
    rows = {item.text.split(",")[0]: item.text for item in choose(found) if item.topic == "choice"}
    return {key.removeprefix("Limited by "): text for key, text in rows.items()}


def names(found: Metrics, batch: int | None) -> list[str]:
    return [option.name for option in frontier(options(found), batch)]


def test_a_better_router_wins_where_arithmetic_is_the_limit() -> None:
    found = metrics(routed=11.0, static=12.0)
    assert names(found, None) == ["pre-gating router", "dense"]
    text = next(t for t in texts(found).values() if t.startswith("Limited by arithmetic"))
    phi = ffn_share_of_arithmetic(llama())
    assert f"φ = {phi:.2f}: use the pre-gating router" in text
    assert f"at most {1 / (1 - phi / 2):.2f}×" in text  # noqa: RUF001


def test_a_tie_goes_to_the_static_model() -> None:
    found = metrics(routed=11.0, static=11.02, noise=0.05)
    assert names(found, None)[0] == "static model"
    errors = [item.text for item in choose(found) if item.topic == "errors"]
    assert len(errors) == 1
    assert "pre-gating router and static model" in errors[0]


def test_one_stream_goes_to_the_quantized_dense_model() -> None:
    found = metrics(routed=11.0, static=12.0, quantized=10.1)
    assert names(found, 1) == ["dense, 4 bits", "dense"]
    worse = metrics(routed=10.5, static=12.0, quantized=14.0)
    assert names(worse, 1) == ["dense, 4 bits", "pre-gating router", "dense"]
    # At batch 64 all experts are read: the router gains nothing, the dense model is simpler.
    assert names(worse, 64) == ["dense, 4 bits", "static model", "dense"]


def test_what_was_not_measured_is_named() -> None:
    statements = [item.text for item in choose(metrics(quantized=None))]
    assert any("quantized dense model was not measured" in text for text in statements)
    assert not any("was not measured" in item.text for item in choose(metrics()))
    assert list(choose(metrics(weights=None))) == []


def test_unpaired_numbers_do_not_crown_the_simpler_model_that_looks_worse() -> None:
    speed: dict[int | None, float] = {None: 1.6}
    routed = Option("routed", Score(ppl=11.0), 3, None, speed)
    static = Option("static", Score(ppl=12.0), 2, None, speed)
    assert [o.name for o in frontier([routed, static], None)] == ["routed", "static"]
    better = Option("static", Score(ppl=10.9), 2, None, speed)
    assert [o.name for o in frontier([routed, better], None)] == ["static"]


def test_divisions_come_from_the_recipe(demo_model: Path) -> None:
    from fissile.run.metrics import _divisions

    recipe = Recipe.model_validate({"name": "x"})
    ffn = 11008
    context: Any = type("C", (), {})()
    context.recipe = recipe
    context.source = type("S", (), {"config": type("F", (), {"intermediate_size": ffn})()})()
    for row in _divisions(context):
        experts = (1 - row["shared"]) * ffn
        active = row["shared"] * ffn + experts / row["num_experts"] * row["top_k"]
        assert row["share"] == pytest.approx(active / ffn)
        assert row["share"] == pytest.approx(row["wanted"], abs=0.05)
