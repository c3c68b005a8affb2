"""Refinement finds planted experts, never loses energy, and does not peek at what it predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fissile.refactor.oracle import top_experts
from fissile.refactor.partition import Partition, build_partition, random_partition
from fissile.refactor.refine import (
    ChoiceEnergy,
    LayerSample,
    cross_predict,
    refine_partitions,
)
from fissile.refactor.statistics import column_norms

E, M, S, T, D, K = 4, 6, 5, 600, 12, 1
F = S + E * M


def planted_layer(seed: int, topic_T: Tensor) -> tuple[LayerSample, Tensor]:
    """Neurons that fire on one topic each, S that always fire, in random places."""
    rng = torch.Generator().manual_seed(seed)
    topic_F = torch.arange(E).repeat_interleave(M)
    topic_F = torch.cat([topic_F, torch.full((S,), -1)])[torch.randperm(F, generator=rng)]
    fires_TF = (topic_F == topic_T[:, None]) | (topic_F == -1)
    h_TF = torch.where(fires_TF, 1.0, 0.05) * torch.randn(T, F, generator=rng)
    code_ED = torch.randn(E, D, generator=rng)
    x_TD = code_ED[topic_T] + 0.1 * torch.randn(T, D, generator=rng)
    down_DF = torch.nn.functional.normalize(torch.randn(64, F, generator=rng), dim=0)
    return LayerSample(h_TF, x_TD, down_DF), topic_F


def shuffled(topic_F: Tensor, seed: int) -> Partition:
    """The planted partition with experts renumbered and half of all neurons dealt out again."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.randperm(E, generator=rng), torch.tensor([-1])])[topic_F]
    moved = torch.randperm(F, generator=rng)[: F // 2]
    labels[moved] = labels[moved][torch.randperm(F // 2, generator=rng)]
    return build_partition(torch.nonzero(labels < 0).flatten(), labels, E)


@pytest.fixture
def topic_T() -> Tensor:
    return torch.randint(0, E, (T,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("predicted", [True, False])
def test_planted_experts_are_found(topic_T: Tensor, common: bool, predicted: bool) -> None:
    samples, topics = zip(*(planted_layer(seed, topic_T) for seed in range(3)), strict=True)
    starts = [shuffled(topic_F, seed) for seed, topic_F in enumerate(topics)]
    refined = refine_partitions(
        starts,
        lambda i: samples[i],
        torch.arange(T) // 20,
        top_k=K,
        common=common,
        predict_from=(lambda i: samples[0 if common else i].x_TD) if predicted else None,
        rounds=20,
        ridge=1e-2,
    )
    assert refined.captured[0] < 0.8
    assert max(refined.captured) > 0.99
    meanings = []
    for partition, topic_F in zip(refined.partitions, topics, strict=True):
        assert (topic_F[partition.shared] == -1).all()
        held = [topic_F[index].unique().tolist() for index in partition.expert_indices()]
        assert sorted(held) == [[e] for e in range(E)]
        meanings.append(held)
    if common:
        assert meanings[0] == meanings[1] == meanings[2]


def test_layers_are_aligned_before_they_choose_together(topic_T: Tensor) -> None:
    samples, topics = zip(*(planted_layer(seed, topic_T) for seed in range(3)), strict=True)
    starts = []
    for seed, topic_F in enumerate(topics):
        numbers = torch.randperm(E, generator=torch.Generator().manual_seed(seed))
        labels = torch.cat([numbers, torch.tensor([-1])])[topic_F]
        starts.append(build_partition(torch.nonzero(labels < 0).flatten(), labels, E))
    refined = refine_partitions(
        starts,
        lambda i: samples[i],
        torch.arange(T),
        top_k=K,
        common=True,
        predict_from=None,
        rounds=0,
        ridge=1e-2,
    )
    assert refined.captured == pytest.approx([1.0], abs=0.01)


def test_energy_against_a_plain_loop(topic_T: Tensor) -> None:
    layer, _ = planted_layer(0, topic_T)
    mean_F = layer.h_TF.mean(0)
    choice_TK = torch.stack([topic_T, (topic_T + 1) % E], dim=1)
    energy = ChoiceEnergy(column_norms(layer.down_DF), E, mean_F)
    energy.add(layer.h_TF[:100], choice_TK[:100])
    energy.add(layer.h_TF[100:], choice_TK[100:])
    output = ((layer.h_TF - mean_F).double() ** 2) * layer.down_DF.double().square().sum(0)
    for e in range(E):
        expected = output[(choice_TK == e).any(1)].sum(0)
        torch.testing.assert_close(energy.chosen_FE[:, e], expected, rtol=1e-6, atol=1e-9)
    partition = random_partition(torch.rand(F), shared_size=S, num_experts=E, seed=0)
    labels = partition.labels_F()
    kept = sum(
        output[t, f]
        for t in range(T)
        for f in range(F)
        if labels[f] < 0 or int(labels[f]) in choice_TK[t].tolist()
    )
    assert energy.captured(partition) == pytest.approx(float(kept / output.sum()), rel=1e-6)


def test_reassignment_is_the_best_partition(topic_T: Tensor) -> None:
    layer, _ = planted_layer(1, topic_T)
    rng = torch.Generator().manual_seed(5)
    energy = ChoiceEnergy(column_norms(layer.down_DF), E)
    energy.add(layer.h_TF, top_experts(torch.rand(T, E, generator=rng), 2))
    partition = energy.reassign(S, M)
    gain = torch.cat(
        [energy.chosen_FE.repeat_interleave(M, 1), energy.total_F[:, None].repeat(1, S)], 1
    )
    rows, columns = linear_sum_assignment(-gain.numpy())
    best = gain.numpy()[rows, columns].sum() / float(energy.total_F.sum())
    assert energy.captured(partition) == pytest.approx(best, rel=1e-12)
    assert (partition.shared_size, partition.expert_size, partition.num_experts) == (S, M, E)


def test_the_best_round_is_returned_even_if_a_later_one_is_worse(topic_T: Tensor) -> None:
    rng = torch.Generator().manual_seed(3)
    layers = []
    for _ in range(2):
        h = torch.randn(T, F, generator=rng) * torch.rand(T, 1, generator=rng)
        layers.append(
            LayerSample(h, torch.randn(T, D, generator=rng), torch.randn(8, F, generator=rng))
        )
    starts = [random_partition(torch.rand(F), shared_size=S, num_experts=E, seed=0)] * 2
    for rounds in (0, 1, 6):
        refined = refine_partitions(
            starts,
            lambda i: layers[i],
            torch.arange(T),
            top_k=2,
            common=False,
            predict_from=None,
            rounds=rounds,
            ridge=1e-2,
        )
        assert len(refined.captured) <= rounds + 1
        again = []
        for layer, partition in zip(layers, refined.partitions, strict=True):
            energy = ChoiceEnergy(column_norms(layer.down_DF), E)
            labels = partition.labels_F()
            output = [
                layer.h_TF[:, labels == e] @ layer.down_DF[:, labels == e].T for e in range(E)
            ]
            norms = torch.stack([y.norm(dim=1) for y in output], dim=1)
            energy.add(layer.h_TF, norms.topk(2).indices)
            again.append(energy.captured(partition))
        assert np.mean(again) == pytest.approx(max(refined.captured), rel=1e-5)
    assert max(refined.captured) > refined.captured[0] + 0.01


def test_predictions_have_not_seen_their_own_sequence() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 90, generator=rng), torch.randn(200, 3, generator=rng)
    sequence = torch.arange(200) // 10
    blind = cross_predict(x, y, sequence, 1e-6)
    assert abs(np.corrcoef(blind.flatten(), y.flatten())[0, 1]) < 0.15  # 0.67 if fitted on itself
    truth = torch.randn(3, 90, generator=rng)
    linear = cross_predict(x, x @ truth.T + 7, sequence, 1e-6)
    torch.testing.assert_close(linear, x @ truth.T + 7, rtol=1e-2, atol=1e-2)
    alone = cross_predict(x, x @ truth.T, torch.zeros(200, dtype=torch.int64), 1e-6)
    torch.testing.assert_close(alone, x @ truth.T, rtol=1e-2, atol=1e-2)
    changed = y.clone()
    changed[sequence == 4] += 100
    again = cross_predict(x, changed, sequence, 1e-6)
    assert torch.equal(again[sequence == 4], blind[sequence == 4])
    assert not torch.equal(again, blind)


def test_nothing_to_refine() -> None:
    empty: list[Partition] = []
    with pytest.raises(ValueError, match="no partitions"):
        refine_partitions(
            empty,
            lambda i: planted_layer(i, torch.zeros(T, dtype=torch.int64))[0],
            torch.arange(T),
            top_k=1,
            common=True,
            predict_from=None,
            rounds=1,
            ridge=1e-2,
        )
