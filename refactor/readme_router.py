"""Read-ME's own router and its own targets, for comparison on this package's code path.

The paper (arXiv 2410.19123, section 3.3) distils the overlap of activation masks: how many of a
token's strongest neurons belong to each expert. The released code differs from the text, and
`overlap_targets` can do either; its loss is reproduced by `readme_targets`.
Shapes: N windows, S tokens per window, T = N*S tokens, F FFN width, E routed experts, L layers,
H router heads (1 or L), V vocabulary, D model width, W router width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.config import Route as RouteSettings
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.routers_fissile import ReadMeRouter
from fissile.models.stream import StreamedModel
from fissile.refactor.oracle import HasExperts
from fissile.refactor.router import DistilledRouter, RouterBatches, new_router, run_router
from fissile.refactor.training import Progress, TrainSettings, train
from fissile.workers import Workers

LEVELS = 5
"""Nested top sets of the released code."""
SHARPNESS = 10.0
"""Factor of the overlaps before they are compared."""


def overlap_targets(
    h_TF: Tensor, partition: HasExperts, kind: Literal["signed", "magnitude"] = "signed"
) -> Tensor:
    """How much of a token's strongest activations falls on each expert.

    Of n strongest neurons (n the size of an expert without the permanent neurons), those in the
    nested sets of n-1, 4n/5, 3n/5, 2n/5 and n/5 weigh 1/(3n) per set; all weights together are 1.

    Args:
        h_TF: activations of the dense FFN, the input of its down projection.
        partition: experts, overlapping or disjoint; permanent neurons belong to none.
        kind: "signed" ranks h as the released code does, "magnitude" |h| as the paper says.

    Returns:
        (T, E) float32 in [0, 1].

    Raises:
        ValueError: an expert is too small for the levels, or an unknown kind.
    """
    if kind not in ("signed", "magnitude"):
        raise ValueError(f"kind {kind!r} is neither 'signed' nor 'magnitude'")
    index = partition.expert_indices()
    size = len(index[0])
    if size < LEVELS:
        raise ValueError(f"experts of {size} neurons: {LEVELS} nested sets need at least {LEVELS}")
    counts = [size - 1, *(size * level // LEVELS for level in range(LEVELS - 1, 0, -1))]
    place = torch.arange(size - 1, device=h_TF.device)
    weight_R = sum((place < count).float() for count in counts) / (3 * size)
    assert isinstance(weight_R, Tensor)
    member_FE = torch.zeros(h_TF.shape[1], len(index), device=h_TF.device)
    for e, own in enumerate(index):
        member_FE[own, e] = 1.0
    ranked_TF = h_TF.float() if kind == "signed" else h_TF.float().abs()
    strongest_TR = ranked_TF.topk(size - 1, dim=1).indices
    weights_TF = torch.zeros_like(ranked_TF)
    weights_TF.scatter_(1, strongest_TR, weight_R.expand_as(strongest_TR))
    return weights_TF @ member_FE


def readme_targets(overlaps_LTE: Tensor, per_layer: bool) -> Tensor:
    """The distribution that Read-ME's loss asks for, summed over the layers a head serves.

    A layer asks for 0.75 of the best expert, smoothed by 0.5, and 0.25 of softmax(10 overlap). The
    cross entropy is linear in its target, so the layers' losses add up in one.

    Args:
        overlaps_LTE: from `overlap_targets`.
        per_layer: one target per layer instead of their sum.

    Returns:
        (H, T, E); a row sums to the number of layers it stands for.
    """
    experts = overlaps_LTE.shape[-1]
    soft = torch.softmax(SHARPNESS * overlaps_LTE.float(), dim=-1)
    hard = torch.nn.functional.one_hot(overlaps_LTE.argmax(-1), experts).float()
    target_LTE = 0.75 * (0.5 * hard + 0.5 / experts) + 0.25 * soft
    return target_LTE if per_layer else target_LTE.sum(0, keepdim=True)


def embedding_start(table_VD: Tensor, width: int) -> Tensor:
    """The principal components of the backbone's embeddings as the router's own table, (V, W).

    Rows have unit mean square; a router wider than the model gets columns of zeros.
    """
    centred = table_VD.double() - table_VD.double().mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    kept = min(width, len(vectors))
    start = centred @ vectors[:, -kept:].flip(1)
    start = start / start.square().mean().sqrt().clamp_min(1e-30)
    return torch.nn.functional.pad(start, (0, width - kept)).float()


def distill_readme(
    model: StreamedModel,
    config: FissileConfig,
    ids_NS: Tensor,
    targets_HTE: Tensor,
    settings: RouteSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> DistilledRouter:
    """Train Read-ME's router with its loss.

    Args:
        model: the dense model; its embeddings start the router's table.
        config: the converted model's: `routing` of kind "pregate" whose router is of block
            "readme", with `width`, `inner_dim` and `query_heads`.
        ids_NS: int64 windows without padding.
        targets_HTE: from `readme_targets`, tokens in window order.
        settings: steps, batch and learning rate.
        seed: of the initial weights and of the order of windows.
        checkpoint: resumable state, see `training.train`.
        progress: called as (stage, done, total, detail).
        workers: as in `distill_router`.

    Raises:
        ValueError: the config describes another router.
        UsageError: a batch holds fewer windows than there are processes.
    """
    workers = workers or Workers()
    router = new_router(config, seed)
    if not isinstance(router, ReadMeRouter):
        raise ValueError('config.routing.router.block must be "readme"')
    width = router.embed_tokens.weight.shape[1]
    router.embed_tokens.weight.data = embedding_start(model.embedding.weight, width)
    windows, tokens = ids_NS.shape
    targets_NSHE = targets_HTE.transpose(0, 1).unflatten(0, (windows, tokens))
    batch = RouterBatches(windows, tokens, settings.batch_tokens, seed, workers)

    def loss_of(step: int) -> Tensor:
        pick, weight = batch.own(step)
        ids = ids_NS[pick]
        logits_HTE = run_router(router, model, config, ids, model.embed(ids))
        log_q = torch.log_softmax(logits_HTE.float(), dim=-1)
        target_HTE = targets_NSHE[pick].flatten(0, 1).transpose(0, 1)
        return -weight * (target_HTE * log_q).sum(-1).mean(1).sum()

    plan = TrainSettings(
        settings.steps, settings.learning_rate, schedule="cosine", warmup=0.0, weight_decay=0.01
    )
    trained = {n: p for n, p in router.named_parameters() if p.requires_grad}
    how: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress, "workers": workers}
    curve = train(trained, loss_of, plan, stage="route", **how)
    return DistilledRouter({k: v.detach() for k, v in router.state_dict().items()}, curve.losses)
