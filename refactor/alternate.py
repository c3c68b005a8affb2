"""Read-ME's alternation as a mode: rounds of the router alone, then of everything else.

Section 3.4 of Read-ME (NeurIPS 2024): in every round the router first learns from the experts as
they are, with the backbone frozen, then the backbone learns with the router frozen; both rates
follow a cosine within a round and fall by a constant factor per round. The router's targets are the
output norms of the current model's experts instead of mask overlaps (section 3.3).

Shapes: B windows, S tokens per window, T = B*S tokens, D model width, E experts, L layers, H heads
of a router (1 or L).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fissile.config import Recover
from fissile.errors import UsageError
from fissile.models.modules_fissile import RoutedMLP
from fissile.models.precision import ROUTER_PARTS
from fissile.refactor.router import oracle_targets
from fissile.refactor.training import Curve, Progress, TrainSettings

if TYPE_CHECKING:
    from fissile.refactor.recover import Lesson


def alternate(
    model: Any,
    chosen: Mapping[str, nn.Parameter],
    fit: Lesson,
    run: Callable[..., Curve],
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[Curve, Curve]:
    """Train in rounds of router and rest.

    Args:
        model: routed model, with or without adapters; changed in place.
        chosen: what is trained, by name.
        fit: windows and the loss of the rest.
        run: `training.train` with what all stages have in common.
        checkpoint: resumable state; every stage has its own file beside it.
        progress: called as (stage, done, total, detail), in steps or seconds of all rounds.

    Returns:
        Curves of the rest and of the router, rounds joined.

    Raises:
        UsageError: the model has no router.
    """
    of_router = {n: p for n, p in chosen.items() if any(part in n for part in ROUTER_PARTS)}
    rest = {n: p for n, p in chosen.items() if n not in of_router}
    if not of_router:
        raise UsageError("recover.alternate: this model has no router to train")
    curves = {"router": Curve(), "rest": Curve()}
    stages = _stages(fit.settings, fit.settings.steps_of(fit.step_tokens))
    units = [plan.steps or round(plan.seconds or 0) for _, plan in stages]
    for i, (role, plan) in enumerate(stages):
        trained = of_router if role == "router" else rest
        for name, parameter in chosen.items():
            parameter.requires_grad_(name in trained)
        model.train(role == "rest")
        seen = sum(len(c.losses) for c in curves.values()) * plan.accumulate
        path = checkpoint
        if checkpoint is not None:
            path = checkpoint.with_name(f"{checkpoint.stem}.{i:03d}{checkpoint.suffix}")
        part = run(
            trained,
            _loss(model, fit, role, seen),
            plan,
            checkpoint=path,
            progress=progress and _shifted(progress, sum(units[:i]), sum(units), role),
        )
        curves[role].losses.extend(part.losses)
        curves[role].norms.extend(part.norms)
        curves[role].seconds += part.seconds
    return curves["rest"], curves["router"]


def _stages(settings: Recover, total: int | None) -> list[tuple[str, TrainSettings]]:
    """Role, budget and rate of every stage, in order."""
    rules, stages = settings.alternate, []
    roles = (
        ("router", rules.router_share, rules.router_rate),
        ("rest", 1 - rules.router_share, rules.expert_rate),
    )
    for number in range(rules.rounds):
        for role, share, rate in roles:
            plan = TrainSettings(
                max(1, round(total * share / rules.rounds)) if total else None,
                rate * rules.round_decay**number,
                seconds=settings.seconds and settings.seconds * share / rules.rounds,
                schedule="cosine",
                warmup=0.0,
                accumulate=settings.accumulate,
                weight_decay=settings.weight_decay,
                clip=settings.clip,
            )
            stages.append((role, plan))
    return stages


def _shifted(progress: Progress, before: int, total: int, role: str) -> Progress:
    """Progress of one stage as that of all."""

    def show(stage: str, done: int, _total: int, detail: str) -> None:
        progress(stage, before + done, total, f"{role} {detail}")

    return show


def _loss(model: Any, fit: Lesson, role: str, seen: int) -> Callable[[int], Tensor]:
    if role == "rest":
        return lambda batch: fit.loss(model, fit.batch(seen + batch))
    temperature = fit.settings.alternate.temperature

    def of_router(batch: int) -> Tensor:
        own, weight = fit.own(fit.batch(seen + batch))
        ids_BS = fit.teacher.ids_NS[own].to(fit.workers.device)
        return router_loss(model, ids_BS, temperature) * weight

    return of_router


def router_loss(model: Any, ids_BS: Tensor, temperature: float) -> Tensor:
    """KL from the oracle's soft choice among the model's present experts to the router's.

    Args:
        model: routed model in evaluation mode, so that its choices carry no gradient.
        ids_BS: int64 windows without padding.
        temperature: of the targets, see `router.oracle_targets`.

    Returns:
        Mean over heads and tokens, in nats, with gradients into the router alone.
    """
    with _watched(model) as (inputs, logits):
        model(input_ids=ids_BS, use_cache=False)
    mlps = [m for m in model.modules() if isinstance(m, RoutedMLP)]
    with torch.no_grad():
        count = logits[0].shape[-1]
        norms_LTE = torch.stack([_norms(m, x, count) for m, x in zip(mlps, inputs, strict=True)])
    logits_HTE = logits[0] if len(logits) == 1 else torch.stack(logits)
    logits_HTE = logits_HTE if logits_HTE.ndim == 3 else logits_HTE[None]
    targets_HTE = oracle_targets(norms_LTE, per_layer=len(logits_HTE) > 1)
    p_HTE = torch.softmax(targets_HTE / temperature, dim=-1)
    log_q_HTE = torch.log_softmax(logits_HTE.float(), dim=-1)
    return nn.functional.kl_div(log_q_HTE, p_HTE, reduction="none").sum(-1).mean()


@contextmanager
def _watched(model: Any) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Collect the inputs of every routed MLP (T, D) and the logits of every router."""
    inputs: list[Tensor] = []
    logits: list[Tensor] = []
    ends = tuple(part[:-1] for part in ROUTER_PARTS)
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, RoutedMLP):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _module, args: inputs.append(args[0].detach().flatten(0, -2))
                )
            )
        elif name.endswith(ends):
            handles.append(
                module.register_forward_hook(lambda _module, _args, out: logits.append(out))
            )
    try:
        yield inputs, logits
    finally:
        for handle in handles:
            handle.remove()


def _norms(mlp: RoutedMLP, x_TD: Tensor, count: int) -> Tensor:
    """Norm of every expert's output as the model has it now, adapters included, (T, E)."""
    pool, norms = mlp.pool, []
    h_TP = pool.neurons(x_TD) if pool is not None else None
    one_T1 = x_TD.new_ones(len(x_TD), 1)
    for expert in range(count):
        if pool is not None and h_TP is not None:
            keep_P = h_TP.new_zeros(h_TP.shape[1])
            keep_P[pool.rows(expert).to(keep_P.device)] = 1
            out_TD = pool.down_proj(h_TP * keep_P)
        else:
            assert mlp.experts is not None
            out_TD = mlp.experts(x_TD, torch.full_like(one_T1, expert, dtype=torch.int64), one_T1)
        norms.append(torch.linalg.vector_norm(out_TD.float(), dim=-1))
    return torch.stack(norms, dim=-1)
