"""Distillation of the pre-gating router from the oracle (Read-ME, section 3.3, with changes).

The teacher is the norm of every expert's true output, not the overlap of activation masks: it is
what the oracle router ranks by. All layers' targets are averaged when one decision serves them all.
Shapes: N windows, S tokens per window, T = N*S tokens, D model width, E routed experts, L layers,
H router heads (1 or L).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fissile.config import Route as RouteSettings
from fissile.errors import UsageError
from fissile.models.build import prepare_parts
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.modeling_fissile import build_context
from fissile.models.routers_fissile import Router, build_router
from fissile.models.stream import StreamedModel, batches
from fissile.refactor.balance import calibrate_threshold
from fissile.refactor.training import Progress, TrainSettings, step_generator, train
from fissile.workers import Workers


@dataclass(frozen=True)
class DistilledRouter:
    """A trained router.

    Attributes:
        state: tensors named relative to `model.router.`.
        curve: training loss per step, nats.
    """

    state: dict[str, Tensor]
    curve: list[float]


def oracle_targets(norms_LTE: Tensor, per_layer: bool, weights_L: Tensor | None = None) -> Tensor:
    """Standardise the oracle's norms so that layers can be compared and averaged.

    Only differences between experts matter to a ranking, so each token's mean is removed; dividing
    by the layer's deviation gives every layer the same say, unless weights say otherwise.

    Args:
        norms_LTE: output norms, float (L, T, E), experts aligned across layers.
        per_layer: keep one target per layer instead of their mean.
        weights_L: what a unit of squared output error costs the model in each layer, float (L,); a
            layer's say is then what its choices can cost, see `choice_costs`.

    Returns:
        (H, T, E) float32; the common target has the deviation of a plain mean.
    """
    z = norms_LTE.float() - norms_LTE.float().mean(-1, keepdim=True)
    z = z / z.pow(2).mean((1, 2), keepdim=True).sqrt().clamp_min(1e-12)
    if per_layer:
        return z
    plain = z.mean(0, keepdim=True)
    if weights_L is None:
        return plain
    say_L = choice_costs(norms_LTE, weights_L).to(z.dtype)
    common = (say_L[:, None, None] * z).mean(0, keepdim=True)
    return common * (plain.pow(2).mean() / common.pow(2).mean().clamp_min(1e-24)).sqrt()


def threshold_targets(
    norms_LTE: Tensor,
    per_layer: bool,
    mean_k: int,
    max_k: int,
    weights_L: Tensor | None = None,
) -> Tensor:
    """Which experts a threshold would take that means the same for all tokens: 1.0 or 0.0.

    Norms are not centred, so tokens with more at stake have more experts. For one decision a
    layer's norms count in proportion to the root of what their squares cost.

    Args:
        norms_LTE: output norms, float (L, T, E), experts aligned across layers.
        per_layer: a threshold per layer instead of one on the sum over layers.
        mean_k: experts per token in the mean.
        max_k: most experts of one token.
        weights_L: what a unit of squared output error costs the model in each layer, float (L,);
            default the inverse of each layer's mean square.

    Returns:
        (H, T, E) float32.
    """
    values_HTE = norms_LTE.float()
    if not per_layer:
        weights_L = 1 / values_HTE.square().mean((1, 2)) if weights_L is None else weights_L.float()
        values_HTE = torch.einsum("l,lte->te", weights_L.sqrt(), values_HTE)[None]
    return torch.stack([_taken(values_TE, mean_k, max_k) for values_TE in values_HTE])


def _taken(values_TE: Tensor, mean_k: int, max_k: int) -> Tensor:
    top_TK, index_TK = values_TE.topk(max_k, dim=-1)
    above_TK = (top_TK >= calibrate_threshold(values_TE, mean_k, max_k)).float()
    return torch.zeros_like(values_TE).scatter(-1, index_TK, above_TK)


def choice_costs(norms_LTE: Tensor, weights_L: Tensor) -> Tensor:
    """What the choice among experts is worth in each layer, (L,) float32 with mean one.

    Args:
        norms_LTE: output norms (L, T, E).
        weights_L: nats per unit of squared output error, (L,).
    """
    spread_L = norms_LTE.float().var(-1, correction=0).mean(1)
    cost_L = spread_L * weights_L.to(spread_L)
    return cost_L / cost_L.mean().clamp_min(1e-30)


def distill_router(
    model: StreamedModel,
    config: FissileConfig,
    ids_NS: Tensor,
    targets_HTE: Tensor,
    settings: RouteSettings,
    *,
    seed: int,
    weights_H: Tensor | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> DistilledRouter:
    """Train the router to rank experts as the oracle does.

    Minimises KL(softmax(target / temperature) || softmax(logits)), averaged over heads and tokens,
    plus `settings.balance` times the KL from the mean choice to the uniform one. With
    `settings.dynamic_k` a softmax would lose what a threshold needs, whether all of a token's
    experts matter much or little: the loss is then the binary cross-entropy of every expert.

    Args:
        model: the dense model; only its embeddings and rotary table are used.
        config: the converted model's, with `routing` of kind "pregate".
        ids_NS: int64 windows without padding.
        targets_HTE: from `oracle_targets`, or `threshold_targets` with `settings.dynamic_k`; tokens
            in window order.
        settings: steps, batch, learning rate, temperature, balance.
        seed: of the initial weights and of the order of windows.
        weights_H: say of every head in the loss, mean one; default all alike.
        checkpoint: resumable state, see `training.train`.
        progress: called as (stage, done, total, detail).
        workers: processes that call this together; each takes its share of every batch, and the
            result is that of one process.

    Raises:
        UsageError: a batch holds fewer windows than there are processes.
    """
    windows, tokens = ids_NS.shape
    say_H = torch.ones(len(targets_HTE)) if weights_H is None else weights_H
    targets_NSHE = targets_HTE.transpose(0, 1).unflatten(0, (windows, tokens))
    router = new_router(config, seed)
    embeds_NSD = model.embed(ids_NS)
    workers = workers or Workers()
    batch = RouterBatches(windows, tokens, settings.batch_tokens, seed, workers)

    def loss_of(step: int) -> Tensor:
        pick, weight = batch.own(step)
        logits_HTE = run_router(router, model, config, ids_NS[pick], embeds_NSD[pick])
        target_HTE = targets_NSHE[pick].flatten(0, 1).transpose(0, 1)
        loss = weight * (_miss(logits_HTE.float(), target_HTE, settings).mean(1) * say_H).mean()
        return (
            loss + settings.balance * batch.skew(logits_HTE, weight) if settings.balance else loss
        )

    plan = TrainSettings(settings.steps, settings.learning_rate, weight_decay=0.1)
    how: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress, "workers": workers}
    curve = train(dict(router.named_parameters()), loss_of, plan, stage="route", **how)
    return DistilledRouter({k: v.detach() for k, v in router.state_dict().items()}, curve.losses)


@dataclass(frozen=True)
class RouterBatches:
    """Windows of every step of a router's training, and this process's part of them.

    Attributes:
        windows: in all.
        tokens: of a window.
        batch_tokens: of one step, at most, all processes together.
        seed: of their order.
        workers: processes that share every batch.
    """

    windows: int
    tokens: int
    batch_tokens: int
    seed: int
    workers: Workers

    def __post_init__(self) -> None:
        if self.size < self.workers.count:
            raise UsageError(
                f"route.batch_tokens {self.batch_tokens} holds {self.size} windows of "
                f"{self.tokens} tokens, fewer than the {self.workers.count} processes"
            )

    @property
    def size(self) -> int:
        """Windows of one step."""
        return max(1, min(self.windows, self.batch_tokens // self.tokens))

    def own(self, step: int) -> tuple[Tensor, float]:
        """Indices of this process's windows, int64, and their weight in the mean over processes."""
        pick = torch.randperm(self.windows, generator=step_generator(self.seed, step))[: self.size]
        own = pick[self.workers.rank :: self.workers.count]
        return own, len(own) * self.workers.count / self.size

    def skew(self, logits_HTE: Tensor, weight: float) -> Tensor:
        """KL from the uniform choice to the mean one of the whole batch, mean over heads.

        It is no mean over parts of the batch, so the parts' loads are averaged first.
        """
        load_HE = self.workers.mean_of(weight * logits_HTE.float().softmax(-1).mean(1))
        uniform = torch.full_like(load_HE, 1.0 / load_HE.shape[-1])
        return nn.functional.kl_div(load_HE.log(), uniform, reduction="none").sum(-1).mean()


def _miss(logits_HTE: Tensor, target_HTE: Tensor, settings: RouteSettings) -> Tensor:
    """Loss of each head and token, (H, T)."""
    if settings.dynamic_k:
        return nn.functional.binary_cross_entropy_with_logits(
            logits_HTE, target_HTE, reduction="none"
        ).sum(-1)
    p = torch.softmax(target_HTE / settings.temperature, dim=-1)
    log_q = torch.log_softmax(logits_HTE, dim=-1)
    return nn.functional.kl_div(log_q, p, reduction="none").sum(-1)


def new_router(config: FissileConfig, seed: int) -> Router:
    """An untrained router whose weights depend on the seed alone."""
    prepare_parts(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = build_router(config)
    assert router is not None
    return router


def run_router(
    router: Router, model: StreamedModel, config: FissileConfig, ids_BS: Tensor, embeds_BSD: Tensor
) -> Tensor:
    """Logits (H, T, E) of windows without padding.

    The converted model's config knows the router's full attention, which a dense model with sliding
    windows alone does not have.
    """
    context = build_context(config, model.rotary, embeds_BSD)
    return router(embeds_BSD, ids_BS, **context.get("full_attention", {}))


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
        rows.append(run_router(router, model, config, ids_NS[part], model.embed(ids_NS[part])))
    return torch.cat(rows, dim=1)
