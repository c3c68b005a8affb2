"""Distillation of the pre-gating router from the oracle (Read-ME, section 3.3, with changes).

The teacher is the norm of every expert's true output, not the overlap of activation masks: it is
what the oracle router ranks by. All layers' targets are averaged when one decision serves them all.
Shapes: N windows, S tokens per window, T = N*S tokens, D model width, E routed experts, L layers,
H router heads (1 or L).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fissile.config import Route as RouteSettings
from fissile.models.build import prepare_parts
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.modules_fissile import PreGateRouter
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.training import Progress, TrainSettings, step_generator, train


@dataclass(frozen=True)
class DistilledRouter:
    """A trained router.

    Attributes:
        state: tensors named relative to `model.router.`.
        curve: training loss per step, nats.
    """

    state: dict[str, Tensor]
    curve: list[float]


def oracle_targets(norms_LTE: Tensor, per_layer: bool) -> Tensor:
    """Standardise the oracle's norms so that layers can be compared and averaged.

    Only differences between experts matter to a ranking, so each token's mean is removed; dividing
    by the layer's deviation gives every layer the same say.

    Args:
        norms_LTE: output norms, float (L, T, E), experts aligned across layers.
        per_layer: keep one target per layer instead of their mean.

    Returns:
        (H, T, E) float32.
    """
    z = norms_LTE.float() - norms_LTE.float().mean(-1, keepdim=True)
    z = z / z.pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
    return z if per_layer else z.mean(0, keepdim=True)


def distill_router(
    model: StreamedModel,
    config: FissileConfig,
    ids_NS: Tensor,
    targets_HTE: Tensor,
    settings: RouteSettings,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> DistilledRouter:
    """Train the router to rank experts as the oracle does.

    Minimises KL(softmax(target / temperature) || softmax(logits)), averaged over heads and tokens,
    plus `settings.balance` times the KL from the mean choice to the uniform one.

    Args:
        model: the dense model; only its embeddings and rotary table are used.
        config: the converted model's, with `routing` of kind "pregate".
        ids_NS: int64 windows without padding.
        targets_HTE: from `oracle_targets`, tokens in window order.
        settings: steps, batch, learning rate, temperature, balance.
        seed: of the initial weights and of the order of windows.
        checkpoint: resumable state, see `training.train`.
        progress: called as (stage, done, total, detail).
    """
    windows, tokens = ids_NS.shape
    targets_NSHE = targets_HTE.transpose(0, 1).unflatten(0, (windows, tokens))
    router = new_router(config, seed)
    embeds_NSD = model.embed(ids_NS)
    size = max(1, min(windows, settings.batch_tokens // tokens))

    def loss_of(step: int) -> Tensor:
        pick = torch.randperm(windows, generator=step_generator(seed, step))[:size]
        context = model.context(embeds_NSD[pick])["full_attention"]
        logits_HTE = router(embeds_NSD[pick], **context)
        log_q = torch.log_softmax(logits_HTE.float(), dim=-1)
        target = targets_NSHE[pick].flatten(0, 1).transpose(0, 1) / settings.temperature
        p = torch.softmax(target, dim=-1)
        loss = nn.functional.kl_div(log_q, p, reduction="none").sum(-1).mean()
        if settings.balance:
            load_HE = log_q.exp().mean(1)
            uniform = torch.full_like(load_HE, 1.0 / load_HE.shape[-1])
            skew = nn.functional.kl_div(load_HE.log(), uniform, reduction="none").sum(-1).mean()
            loss = loss + settings.balance * skew
        return loss

    plan = TrainSettings(settings.steps, settings.learning_rate, weight_decay=0.1)
    curve = train(
        dict(router.named_parameters()),
        loss_of,
        plan,
        checkpoint=checkpoint,
        progress=progress,
        stage="route",
    )
    return DistilledRouter({k: v.detach() for k, v in router.state_dict().items()}, curve)


def new_router(config: FissileConfig, seed: int) -> PreGateRouter:
    """An untrained router whose weights depend on the seed alone."""
    prepare_parts(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PreGateRouter(config, config.num_base_layers)


@torch.no_grad()
def router_logits(
    model: StreamedModel,
    config: FissileConfig,
    state: dict[str, Tensor],
    ids_NS: Tensor,
    batch_tokens: int,
) -> Tensor:
    """Logits of a trained router over windows, (H, T, E)."""
    router = new_router(config, 0)
    router.load_state_dict(state)
    rows = []
    for part in batches(ids_NS, batch_tokens):
        embeds = model.embed(ids_NS[part])
        rows.append(router(embeds, **model.context(embeds)["full_attention"]))
    return torch.cat(rows, dim=1)
