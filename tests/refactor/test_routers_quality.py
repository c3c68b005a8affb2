"""On the trained demo model: which routers find the oracle's experts on text they have not seen.

E = 12 experts of M = 64 neurons, K = 4 chosen, half of the FFN active.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from fissile.eval.corpus import build_corpus
from fissile.eval.documents import read_documents
from fissile.eval.tokens import load_tokenizer
from fissile.eval.windows import sample_windows
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.routers_fissile import choose, selector_scores
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.refactor.balance import balance_bias, calibrate_threshold
from fissile.refactor.calibrate import neurons, run_layer
from fissile.refactor.fit import fit_selector
from fissile.refactor.layerwise import (
    centroid_distance,
    match_scale,
    mean_gate_selector,
    ranking_targets,
    representative_selector,
    ridge_selector,
)
from fissile.refactor.moments import Moments
from fissile.refactor.oracle import chosen_mask, expert_norms, top_experts
from fissile.refactor.partition import Partition, partition_neurons
from fissile.refactor.rivals import (
    MarkerStatistics,
    ProfileStatistics,
    cmoe_layer,
    emoe_layer,
    expertweaver_layer,
)
from fissile.refactor.spectral import SpectralStatistics, spectral_selector
from fissile.refactor.statistics import NeuronStatistics, column_norms

EXPERTS, CHOSEN, CONTEXT, LAYER = 12, 4, 128, 3
silu = torch.nn.functional.silu


@dataclass
class Layer:
    """One layer of the demo model with inputs and oracle norms of two samples of text."""

    gate: Tensor
    up: Tensor
    down: Tensor
    partition: Partition
    features: Tensor
    x: Tensor
    norms: Tensor
    held_x: Tensor
    held_norms: Tensor

    def scores(self, kind: str, selector: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = {k.removeprefix("selector."): v for k, v in selector.items()}
        return selector_scores(kind, weights, x, EXPERTS, silu)

    def recall(self, scores: Tensor) -> float:
        masks = [chosen_mask(top_experts(s, CHOSEN), EXPERTS) for s in (scores, self.held_norms)]
        return float((masks[0] & masks[1]).sum() / masks[1].sum())


@pytest.fixture(scope="module")
def layer(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Layer:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder)
    dense = StreamedModel(CheckpointSource(demo_model))
    tokenizer, inputs = load_tokenizer(demo_model), []
    for name, tokens in (("calibration", 8192), ("heldout", 12288)):
        documents = read_documents(folder / f"{name}.jsonl")
        ids, _, _ = sample_windows(documents, tokenizer, tokens, CONTEXT, 0, config=dense.config)
        hidden = dense.embed(ids)
        for i in range(LAYER + 1):
            rows: list[Tensor] = []

            def visit(
                block: FissileDecoderLayer, x: Tensor, _part: slice, rows: list[Tensor] = rows
            ) -> Tensor:
                rows.append(x)
                return block.mlp(x)

            run_layer(dense, dense.layer(i), hidden, 4096, visit)
        inputs.append(torch.cat(rows))
    block = dense.layer(LAYER)
    mlp = block.mlp.shared
    assert mlp is not None
    stats = NeuronStatistics(column_norms(mlp.down_proj.weight), domains=1, sketch_dim=256, seed=0)
    place = torch.arange(len(inputs[0]))
    stats.add(neurons(block, inputs[0]), torch.zeros_like(place), place)
    features = stats.features(of="magnitude", centred=False)
    partition = partition_neurons(
        stats.score("fluctuation"), features, shared_size=256, num_experts=EXPERTS, seed=0
    )
    down = mlp.down_proj.weight
    norms = [expert_norms(neurons(block, x), down, partition) for x in inputs]
    return Layer(
        mlp.gate_proj.weight,
        mlp.up_proj.weight,
        down,
        partition,
        features,
        inputs[0],
        norms[0],
        inputs[1],
        norms[1],
    )


def ridge_of(layer: Layer, kind: Literal["centred", "absolute"] = "centred") -> dict[str, Tensor]:
    moments = Moments(layer.x.shape[1], EXPERTS)
    moments.add(layer.x, ranking_targets(layer.norms, kind))
    return ridge_selector(moments, 1e-2)


def fit_of(layer: Layer) -> dict[str, Tensor]:
    held = torch.arange(len(layer.x)) // CONTEXT % 8 == 7
    found = fit_selector(ridge_of(layer), layer.x, layer.norms, held, top_k=CHOSEN)
    assert found.recall_after > found.recall_before
    return found.tensors


def test_routers_rank_as_expected_on_new_text(layer: Layer) -> None:
    stats = SpectralStatistics(layer.gate, silu)
    stats.add(layer.x)
    spectral = spectral_selector(stats, layer.gate, layer.up, layer.partition, 32)
    distance = centroid_distance(layer.features, layer.partition)
    one, many = (
        representative_selector(layer.gate, layer.up, layer.partition, distance, count=n)
        for n in (1, 16)
    )
    many = match_scale(many, layer.scores("glu", many, layer.x), layer.norms)
    found = {
        "fit": layer.recall(layer.scores("linear", fit_of(layer), layer.held_x)),
        "ridge": layer.recall(layer.scores("linear", ridge_of(layer), layer.held_x)),
        "spectral": layer.recall(layer.scores("spectral", spectral, layer.held_x)),
        "glu 16": layer.recall(layer.scores("glu", many, layer.held_x)),
        "glu 1": layer.recall(layer.scores("glu", one, layer.held_x)),
        "random": CHOSEN / EXPERTS,
    }
    values = list(found.values())
    assert values == sorted(values, reverse=True), found
    assert found["fit"] > found["ridge"]
    assert found["spectral"] > found["glu 1"] + 0.1
    assert found["glu 1"] > found["random"] + 0.1
    # The mean gate row says how far gates are open in the mean, which is not how large h is.
    gates = mean_gate_selector(layer.gate, layer.partition)
    assert layer.recall(layer.scores("linear", gates, layer.held_x)) < found["glu 1"]


def test_a_threshold_captures_more_than_a_fixed_number(layer: Layer) -> None:
    """Of the output energy: tokens with more at stake get more experts, the mean is the same."""
    held = torch.arange(len(layer.x)) // CONTEXT % 8 == 7
    start = ridge_of(layer, "absolute")
    found = fit_selector(start, layer.x, layer.norms, held, top_k=CHOSEN, loss="threshold")
    assert found.recall_after > found.recall_before
    energy = layer.held_norms.square()
    fixed = energy.gather(
        1, choose(layer.scores("linear", fit_of(layer), layer.held_x), 4, False)[0]
    )
    for selector in (start, found.tensors):
        threshold = calibrate_threshold(layer.scores("linear", selector, layer.x), CHOSEN, 8)
        scores = layer.scores("linear", selector, layer.held_x)
        _, weights = choose(scores, 8, False, threshold=threshold)
        assert weights.sum(1).mean().item() == pytest.approx(CHOSEN, abs=0.25)
        # At exactly the same number of experts, to compare like with like.
        index, weights = choose(scores, 8, False, threshold=calibrate_threshold(scores, CHOSEN, 8))
        assert weights.sum(1).mean().item() == pytest.approx(CHOSEN, abs=1e-3)
        assert (energy.gather(1, index) * weights).sum() > 1.02 * fixed.sum()


def test_an_even_load_costs_mass_on_this_model(layer: Layer) -> None:
    scores = layer.scores("linear", ridge_of(layer), layer.x)
    some, free = (
        balance_bias(scores, CHOSEN, norms_TE=layer.norms, tolerance=t, step=5e-3)
        for t in (0.02, 1.0)
    )
    assert some.mass_loss <= 0.02 < 0.1 < free.mass_loss
    assert free.imbalance_after < 1.3 < some.imbalance_after < some.imbalance_before


def test_rivals_build_balanced_experts_that_a_router_can_choose(layer: Layer) -> None:
    markers = MarkerStatistics(layer.gate, layer.up, silu)
    markers.add(layer.x)
    profiles = ProfileStatistics(layer.gate, silu, 64)
    profiles.add(layer.x, torch.arange(len(layer.x)) // CONTEXT)
    h = silu(layer.held_x @ layer.gate.T) * (layer.held_x @ layer.up.T)
    built = {
        "cmoe": (
            cmoe_layer(markers, layer.gate, layer.up, shared_size=256, num_experts=12),
            (256, 64, 4),
        ),
        "expertweaver": (
            expertweaver_layer(profiles, layer.gate, num_experts=64, active=32, seed=0),
            (0, 16, 32),
        ),
        "emoe": (emoe_layer(layer.up, num_experts=16, seed=0), (0, 64, 8)),
    }
    for name, (rival, (shared, size, top_k)) in built.items():
        partition = rival.partition
        assert (partition.shared_size, partition.expert_size) == (shared, size), name
        # Each computes half of the FFN; its own oracle shows what its experts would allow.
        assert shared + top_k * size == 512
        weights = {k.removeprefix("selector."): v for k, v in rival.selector.items()}
        balance = weights.pop("balance", None)
        count = partition.num_experts
        scores = selector_scores(rival.kind, weights, layer.held_x, count, silu)
        norms = expert_norms(h, layer.down, partition)
        index, _ = choose(scores, top_k, False, balance_E=balance)
        own = norms.gather(1, index).sum() / norms.topk(top_k, dim=1).values.sum()
        assert 0.3 < own < 0.99, name
        assert scores.isfinite().all()
