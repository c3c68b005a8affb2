"""Routers inside the layers: solved, fitted, and how many experts a token takes.

Shapes: T tokens, D model width, E routed experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fissile.config import Recipe
from fissile.models.routers_fissile import selector_scores
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.balance import balance_bias, calibrate_threshold
from fissile.refactor.calibrate import Windows
from fissile.refactor.compensate import is_held_out
from fissile.refactor.convert import AnyPartition
from fissile.refactor.fit import Loss, fit_selector
from fissile.refactor.layerwise import (
    match_scale,
    mean_gate_selector,
    ranking_targets,
    ridge_selector,
)
from fissile.refactor.moments import Moments
from fissile.refactor.oracle import router_quality, top_experts
from fissile.refactor.partition import Partition
from fissile.refactor.redundancy import routing_redundancy
from fissile.refactor.sample import ffn_inputs, pick_windows, window_places
from fissile.refactor.spectral import SpectralStatistics, spectral_selector
from fissile.run.extraction import Calibrated


@dataclass(frozen=True)
class Solved:
    """Routers of all layers.

    Attributes:
        selectors: per layer, tensors named as in the artifact.
        routing: entries of `config.routing` that they need.
        report: what was found on the sample, JSON.
    """

    selectors: list[dict[str, Tensor]]
    routing: dict[str, Any]
    report: dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """Part of the calibration text, as the layers see it.

    Attributes:
        windows: the text.
        inputs: FFN inputs (T, D) of every layer, bfloat16.
        norms: the oracle's norms (T, E) of every layer.
    """

    windows: Windows
    inputs: list[Tensor]
    norms: list[Tensor]

    @classmethod
    def take(
        cls, given: Calibrated, recipe: Recipe, norms: Sequence[Tensor], path: StreamedModel | None
    ) -> Sample:
        """`route.fit_tokens` of the calibration tokens, on the path's activations."""
        wanted = recipe.route.fit_tokens
        windows, places = pick_windows(given.windows, wanted), window_places(given.windows, wanted)
        length = windows.ids_NS.shape[1]
        rows_T = (places[:, None] * length + torch.arange(length)).flatten()
        inputs = ffn_inputs(path or given.dense, windows, recipe.calibrate.batch_tokens)
        return cls(windows, inputs, [norms_TE[rows_T] for norms_TE in norms])


def layer_selectors(
    given: Calibrated,
    recipe: Recipe,
    partitions: Sequence[AnyPartition],
    norms: Sequence[Tensor],
    ridges: Sequence[dict[str, Tensor]],
    path: StreamedModel | None = None,
) -> Solved:
    """The recipe's kind of layer-wise router for every layer, judged on a sample.

    Args:
        given: calibration.
        recipe: its `route` section.
        partitions: experts of every layer.
        norms: the oracle's norms of all calibration tokens (T, E), per layer.
        ridges: closed-form routers.
        path: the converted model, where the oracle was measured on its activations.
    """
    settings, sample = recipe.route, Sample.take(given, recipe, norms, path)
    solved = Solved(list(ridges), {}, {})
    if settings.selector == "mean_gate":
        gates = [_gate_up(given, i)[0] for i in range(len(partitions))]
        pairs = zip(gates, partitions, strict=True)
        solved = Solved([mean_gate_selector(g, _disjoint(p)) for g, p in pairs], {}, {})
    elif settings.selector == "spectral":
        solved = _spectral(given, recipe, partitions, sample)
    elif settings.fit_steps and len(sample.windows.ids_NS) > 1:
        solved = _fitted(given, recipe, ridges, sample)
    choices = []
    for i, x_TD in enumerate(sample.inputs):
        scores_TE = _scores(given, i, solved, x_TD, partitions[i].num_experts)
        choices.append(top_experts(scores_TE, recipe.extract.top_k))
    judged = judge_choices(choices, torch.stack(sample.norms), sample.windows)
    return Solved(solved.selectors, solved.routing, solved.report | judged)


def judge_choices(choices: Sequence[Tensor], norms_LTE: Tensor, windows: Windows) -> dict[str, Any]:
    """A router's "quality" against the oracle, and the "redundancy" of its choices and of its.

    Args:
        choices: int64 (T, K) per layer, or one entry for a decision that serves all.
        norms_LTE: the experts' output norms.
        windows: the text, in the order of the tokens.
    """
    sequence_T = torch.arange(len(windows.ids_NS)).repeat_interleave(windows.ids_NS.shape[1])
    top_k, experts = choices[0].shape[1], norms_LTE.shape[-1]
    sets = {"router": choices, "oracle": [top_experts(norms, top_k) for norms in norms_LTE]}
    redundancy = {
        name: routing_redundancy(found, sequence_T, num_experts=experts)
        for name, found in sets.items()
    }
    return {"quality": router_quality(choices, norms_LTE, sequence_T), "redundancy": redundancy}


def _fitted(
    given: Calibrated, recipe: Recipe, ridges: Sequence[dict[str, Tensor]], sample: Sample
) -> Solved:
    """The convex fit from the closed-form start."""
    settings, (count, length) = recipe.route, sample.windows.ids_NS.shape
    held_N = torch.tensor([is_held_out(n) for n in range(count)])
    if not bool(held_N.any()):
        held_N[-1] = True
    loss: Loss = "threshold" if settings.dynamic_k else "membership"
    selectors, recalls = [], []
    for i, (start, x_TD, norms_TE) in enumerate(
        zip(ridges, sample.inputs, sample.norms, strict=True)
    ):
        if settings.dynamic_k:
            start = _absolute_ridge(x_TD, norms_TE, settings.ridge)
        fitted = fit_selector(
            start,
            x_TD,
            norms_TE,
            held_N.repeat_interleave(length),
            top_k=recipe.extract.top_k,
            loss=loss,
            steps=settings.fit_steps,
        )
        selectors.append(fitted.tensors)
        recalls.append([fitted.recall_before, fitted.recall_after])
        change = f"recall {fitted.recall_before:.3f} to {fitted.recall_after:.3f}"
        given.progress("route", i + 1, len(ridges), change)
    return Solved(selectors, {}, {"held_out_recall": recalls})


def _spectral(
    given: Calibrated, recipe: Recipe, partitions: Sequence[AnyPartition], sample: Sample
) -> Solved:
    rank = min([recipe.route.selector_rank, *(_disjoint(p).expert_size for p in partitions)])
    routing = {"selector": "spectral", "selector_rank": rank}
    selectors = []
    for i, (partition, x_TD) in enumerate(zip(partitions, sample.inputs, strict=True)):
        gate_FD, up_FD = _gate_up(given, i)
        stats = SpectralStatistics(gate_FD, _activation(given, i))
        stats.add(x_TD)
        selector = spectral_selector(stats, gate_FD, up_FD, _disjoint(partition), rank)
        alone = Solved([selector] * (i + 1), routing, {})
        scores_TE = _scores(given, i, alone, x_TD, partition.num_experts)
        selectors.append(match_scale(selector, scores_TE, sample.norms[i]))
        given.progress("route", i + 1, len(partitions), f"spectral, rank {rank}")
    return Solved(selectors, routing, {})


def _scores(given: Calibrated, layer: int, solved: Solved, x_TD: Tensor, experts: int) -> Tensor:
    """What a layer's router says of its inputs, (T, E)."""
    weights = {k.removeprefix("selector."): v for k, v in solved.selectors[layer].items()}
    kind = solved.routing.get("selector", "linear")
    return selector_scores(kind, weights, x_TD.float(), experts, _activation(given, layer))


def _activation(given: Calibrated, layer: int) -> Callable[[Tensor], Tensor]:
    mlp = given.dense.layer(layer).mlp.shared
    assert mlp is not None
    return mlp.act_fn


def _absolute_ridge(x_TD: Tensor, norms_TE: Tensor, ridge: float) -> dict[str, Tensor]:
    """Ridge towards the norms themselves: one threshold then means the same for all tokens."""
    moments = Moments(x_TD.shape[1], norms_TE.shape[1])
    moments.add(x_TD.float(), ranking_targets(norms_TE, "absolute"))
    return ridge_selector(moments, ridge)


def _gate_up(given: Calibrated, layer: int) -> tuple[Tensor, Tensor]:
    state = given.dense.source.layer_state(layer)
    return state["mlp.shared.gate_proj.weight"], state["mlp.shared.up_proj.weight"]


def _disjoint(partition: AnyPartition) -> Partition:
    if not isinstance(partition, Partition):
        raise ValueError("this router needs disjoint experts")
    return partition


def choice_routing(recipe: Recipe) -> dict[str, Any]:
    """Entries of `config.routing` that announce thresholds and balance; none by default."""
    settings, found = recipe.route, dict[str, Any]()
    if settings.balance_load:
        found["selection_bias"] = True
    if settings.dynamic_k:
        found["max_k"] = settings.max_k or min(2 * recipe.extract.top_k, recipe.extract.num_experts)
    return found


def calibrate_scores(scores_TE: Tensor, recipe: Recipe) -> tuple[Tensor | None, float | None]:
    """Balance bias (E,) and threshold for one decision, each None unless the recipe wants it."""
    top_k, bias_E, threshold = recipe.extract.top_k, None, None
    if recipe.route.balance_load:
        bias_E = balance_bias(scores_TE, top_k).bias_E
        scores_TE = scores_TE + bias_E
    if recipe.route.dynamic_k:
        threshold = calibrate_threshold(scores_TE, top_k, choice_routing(recipe)["max_k"])
    return bias_E, threshold


@torch.no_grad()
def calibrate_layers(
    converted: StreamedModel, ids_NS: Tensor, recipe: Recipe
) -> tuple[list[Tensor], list[float]]:
    """Biases and thresholds of layer-wise routers, each on the outputs of the finished layers.

    Thresholds that were found on the dense model's activations do not fit the converted one's.

    Args:
        converted: the routed model, with zero biases and without thresholds.
        ids_NS: int64 windows without padding.
        recipe: its `route` and `extract` sections.

    Returns:
        Balance biases (E,) and thresholds per layer; empty where the recipe wants none.
    """
    hidden_NSD, parts = (
        converted.embed(ids_NS),
        list(batches(ids_NS, recipe.calibrate.batch_tokens)),
    )
    biases, thresholds = list[Tensor](), list[float]()
    for i in range(converted.num_layers):
        layer = converted.layer(i)
        selector = layer.mlp.selector
        assert selector is not None
        rows = []
        for part in parts:
            hidden = hidden_NSD[part]
            residual = layer.attend(hidden, converted.context(hidden))
            rows.append(selector(layer.mlp_input(residual).flatten(0, 1)))
        bias_E, threshold = calibrate_scores(torch.cat(rows), recipe)
        if bias_E is not None:
            selector.balance = torch.nn.Parameter(bias_E, requires_grad=False)
            biases.append(bias_E)
        if threshold is not None:
            layer.mlp.threshold, layer.mlp.slots = threshold, choice_routing(recipe)["max_k"]
            thresholds.append(threshold)
        for part in parts:
            hidden = hidden_NSD[part]
            hidden_NSD[part] = layer(hidden, None, converted.context(hidden))
    return biases, thresholds
