"""How many neurons each layer may leave uncomputed, under one budget for the whole model.

Layers differ by orders of magnitude in what pruning them costs. What a layer's pruning does to the
output is measured once, by the divergence when that layer alone is pruned; how it grows with the
number of dropped neurons follows the layer's own scores, a proxy that costs nothing. The budget is
then spread exactly, by dynamic programming.
Shapes: N windows, S tokens per window, F FFN width, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.calibrate import down_weight, neurons
from fissile.refactor.training import Progress


def tail_losses(scores_F: Tensor) -> Tensor:
    """What is lost when only the best n neurons are kept: the scores of the others, summed.

    Args:
        scores_F: (F,) importance of each neuron, e.g. fluctuation.

    Returns:
        (F + 1,) float64, for n = 0..F; the last is zero.
    """
    ascending_F = scores_F.double().sort().values
    return torch.cat([ascending_F.new_zeros(1), ascending_F.cumsum(0)]).flip(0)


def spread_budget(losses: Sequence[Tensor], total: int) -> list[int]:
    """Choose one option per layer at the lowest summed loss; option u of a layer costs u.

    Args:
        losses: per layer, loss of options 0..U (U + 1,); infinite where an option is not allowed.
        total: sum of all chosen options.

    Returns:
        The options, one a layer.

    Raises:
        ValueError: no allowed choice adds up to `total`.
    """
    best = torch.full((total + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    taken: list[Tensor] = []
    for loss_U in losses:
        options = torch.full((len(loss_U), total + 1), torch.inf, dtype=torch.float64)
        for u, loss in enumerate(loss_U.tolist()):
            if u <= total:
                options[u, u:] = best[: total + 1 - u] + loss
        best, choice = options.min(0)
        taken.append(choice)
    if not torch.isfinite(best[total]):
        raise ValueError(f"no choice of options adds up to {total}")
    found: list[int] = []
    for choice in reversed(taken):
        found.append(int(choice[total]))
        total -= found[-1]
    return found[::-1]


@torch.no_grad()
def layer_divergences(
    model: StreamedModel,
    ids_NS: Tensor,
    kept: Sequence[Tensor],
    means: Sequence[Tensor],
    *,
    batch_tokens: int,
    progress: Progress | None = None,
) -> list[float]:
    """KL(dense || pruned) per token in nats when one layer alone is pruned, for each layer.

    Every layer is read once; the streams of the models that are pruned further up run beside the
    dense one, so L + 1 copies of the sample's residual stream are held.

    Args:
        model: the dense model.
        ids_NS: int64 windows of the sample, without padding.
        kept: bool (F,) per layer, the neurons that stay.
        means: E[h] (F,) per layer, which stands for dropped neurons.
        batch_tokens: tokens per forward pass.
        progress: called as (stage, done, total, detail).
    """
    dense_NSD, pruned = model.embed(ids_NS), list[Tensor]()
    for i in range(model.num_layers):
        layer = model.layer(i)
        for stream_NSD in pruned:
            _advance(model, layer, stream_NSD, batch_tokens)
        pruned.append(dense_NSD.clone())
        _advance(model, layer, pruned[-1], batch_tokens, kept[i], means[i].float())
        _advance(model, layer, dense_NSD, batch_tokens)
        if progress is not None:
            progress("extract", i + 1, model.num_layers, "divergence of each layer's pruning")
    totals = [0.0] * len(pruned)
    for part in batches(ids_NS, batch_tokens):
        wanted_BSV = model.logits(dense_NSD[part]).log_softmax(-1)
        for i, stream_NSD in enumerate(pruned):
            got_BSV = model.logits(stream_NSD[part]).log_softmax(-1)
            totals[i] += float((wanted_BSV.exp() * (wanted_BSV - got_BSV)).sum())
    return [max(0.0, total / ids_NS.numel()) for total in totals]


def _advance(
    model: StreamedModel,
    layer: FissileDecoderLayer,
    hidden_NSD: Tensor,
    batch_tokens: int,
    kept_F: Tensor | None = None,
    mean_F: Tensor | None = None,
) -> None:
    for part in batches(hidden_NSD, batch_tokens):
        hidden = hidden_NSD[part]
        residual = layer.attend(hidden, model.context(hidden))
        h = neurons(layer, layer.mlp_input(residual))
        if kept_F is not None and mean_F is not None:
            h = torch.where(kept_F, h, mean_F)
        y = torch.nn.functional.linear(h, down_weight(layer))
        hidden_NSD[part] = layer.combine(residual, y)
