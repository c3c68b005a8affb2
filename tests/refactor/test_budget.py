"""The budget over layers: exact against brute force, measured against the model itself."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.refactor.budget import layer_divergences, spread_budget, tail_losses


def test_tails_are_sums_of_the_smallest_scores() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0])
    assert tail_losses(scores).tolist() == [6.0, 3.0, 1.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_spread_is_the_best_of_all(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    losses = [torch.rand(5, generator=rng, dtype=torch.float64) for _ in range(4)]
    losses[0][0] = losses[2][4] = torch.inf
    for total in (3, 8, 14):
        found = spread_budget(losses, total)
        assert sum(found) == total
        cost = sum(float(loss[u]) for loss, u in zip(losses, found, strict=True))
        best = min(
            sum(float(loss[u]) for loss, u in zip(losses, option, strict=True))
            for option in itertools.product(range(5), repeat=4)
            if sum(option) == total
        )
        assert math.isfinite(best)
        assert cost == pytest.approx(best, rel=1e-12)


def test_a_budget_that_no_choice_meets_is_refused() -> None:
    losses = [torch.tensor([torch.inf, 1.0, 2.0])] * 2
    with pytest.raises(ValueError, match="adds up to 5"):
        spread_budget(losses, 5)
    with pytest.raises(ValueError, match="adds up to 1"):
        spread_budget(losses, 1)


def test_divergences_are_those_of_models_pruned_in_one_layer(tiny_model: Path) -> None:
    """Against transformers' own model with the down projection's columns replaced by a bias."""
    dense = StreamedModel(CheckpointSource(tiny_model))
    stock = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 8192, (3, 12), generator=rng)
    width, layers = dense.config.intermediate_size, dense.num_layers
    kept = [torch.rand(width, generator=rng) > 0.5 for _ in range(layers)]
    means = [0.01 * torch.randn(width, generator=rng, dtype=torch.float64) for _ in range(layers)]
    found = layer_divergences(dense, ids, kept, means, batch_tokens=24)
    with torch.no_grad():
        wanted = stock(ids).logits.double().log_softmax(-1)
        for i in range(layers):
            down = stock.model.layers[i].mlp.down_proj
            handle = down.register_forward_pre_hook(
                lambda _module, args, i=i: torch.where(kept[i], args[0], means[i].float())
            )
            got = stock(ids).logits.double().log_softmax(-1)
            handle.remove()
            kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
            assert kl > 1e-7
            assert found[i] == pytest.approx(kl.item(), rel=0.02)
