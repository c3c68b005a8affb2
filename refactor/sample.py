"""Refinement of a whole model's experts on a sample of its calibration tokens.

Only the FFN inputs of the sampled tokens are kept, L * T * D numbers; activations are computed
again from them, one layer at a time.
Shapes: N windows, T sampled tokens, D model width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.stream import StreamedModel
from fissile.refactor.calibrate import Windows, down_weight, neurons, path_routes, run_layer
from fissile.refactor.partition import Partition
from fissile.refactor.refine import LayerSample, Refined, refine_partitions
from fissile.refactor.training import Progress

RouterSees = Literal["pregate", "pregate_per_layer", "layerwise", "oracle"]
"""Whose choices the experts are made for: one early decision for all layers, one early decision per
layer, each layer's own input, or the true outputs."""


def pick_windows(windows: Windows, tokens: int) -> Windows:
    """Windows spread evenly over the calibration text, `tokens` in all (at least one window).

    Args:
        windows: calibration text.
        tokens: wanted number of tokens.
    """
    pick = window_places(windows, tokens)
    return Windows(windows.ids_NS[pick], windows.domain_N[pick], windows.domains)


def window_places(windows: Windows, tokens: int) -> Tensor:
    """Which windows `pick_windows` takes, int64."""
    count, length = windows.ids_NS.shape
    size = min(count, max(1, tokens // length))
    return torch.arange(size) * count // size


@torch.no_grad()
def ffn_inputs(model: StreamedModel, windows: Windows, batch_tokens: int) -> list[Tensor]:
    """Inputs of every layer's FFN (T, D) on a dense or routed model's own path, bfloat16."""
    hidden_NSD, routes = model.embed(windows.ids_NS), path_routes(model, windows, batch_tokens)
    inputs = []
    for i in range(model.num_layers):
        rows: list[Tensor] = []

        def visit(
            layer: FissileDecoderLayer,
            x_TD: Tensor,
            part: slice,
            rows: list[Tensor] = rows,
            index: int = i,
        ) -> Tensor:
            rows.append(x_TD.to(torch.bfloat16))
            return layer.mlp(x_TD, routes[part.start][index])

        run_layer(model, model.layer(i), hidden_NSD, batch_tokens, visit)
        inputs.append(torch.cat(rows))
    return inputs


@torch.no_grad()
def refine_experts(
    model: StreamedModel,
    windows: Windows,
    partitions: Sequence[Partition],
    *,
    top_k: int,
    router: RouterSees,
    tokens: int,
    rounds: int,
    ridge: float,
    batch_tokens: int,
    means: Sequence[Tensor] | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Improve the experts of every layer for the router that will choose among them.

    A pre-gating router is stood in for by a linear one on the input of the first FFN.

    Args:
        model: the dense model.
        windows: calibration text.
        partitions: experts to start from, one partition a layer.
        top_k: experts chosen per token.
        router: which router to refine for.
        tokens: size of the sample.
        rounds: most rounds.
        ridge: of the linear stand-in.
        batch_tokens: tokens per forward pass.
        means: E[h] of every layer, where something makes up for constants.
        progress: called as (stage, done, total, detail).
    """
    sampled = pick_windows(windows, tokens)
    inputs = ffn_inputs(model, sampled, batch_tokens)
    count, length = sampled.ids_NS.shape
    calls = 0

    def sample(i: int) -> LayerSample:
        nonlocal calls
        layer, x_TD = model.layer(i), inputs[i].float()
        if progress is not None:
            # The first call of every layer only measures.
            progress("extract", calls, (rounds + 2) * len(inputs), f"refine layer {i}")
        calls += 1
        return LayerSample(neurons(layer, x_TD), x_TD, down_weight(layer))

    return refine_partitions(
        partitions,
        sample,
        torch.arange(count).repeat_interleave(length),
        top_k=top_k,
        common=router == "pregate",
        predict_from=_seen_by(router, inputs),
        rounds=rounds,
        ridge=ridge,
        means=means,
    )


def _seen_by(router: RouterSees, inputs: Sequence[Tensor]) -> Callable[[int], Tensor] | None:
    """What a linear stand-in for the router predicts a layer's choices from."""
    if router == "oracle":
        return None
    return lambda i: inputs[i if router == "layerwise" else 0]
