"""Training after the conversion: LoRA or all weights, towards the dense model's own predictions.

The loss is that of `teacher.distill_loss`; where a router chooses, its straight-through weights let
the loss reach it. Shapes: N windows, S tokens per window, B windows of one step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fissile.config import Recover
from fissile.errors import UsageError
from fissile.io.units import UnitStore
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.precision import ROUTER_PARTS
from fissile.refactor.alternate import alternate
from fissile.refactor.compensate import is_held_out
from fissile.refactor.grouped import ready_to_train
from fissile.refactor.schedules import refined_table
from fissile.refactor.sharding import shard, shards, unsharded
from fissile.refactor.teacher import Teacher, distill_loss
from fissile.refactor.training import Curve, Progress, TrainSettings, step_generator, train
from fissile.workers import Workers


@dataclass(frozen=True)
class Recovered:
    """A trained model and what it achieved.

    Attributes:
        model: adapters merged, evaluation mode, on the CPU.
        curve: loss of every step.
        before: loss on the held-out windows without the training.
        after: the same loss with it.
        norms: L1 norm of every step's gradient, which a refined schedule can start from.
        tokens: read in training, repeats included.
        seconds: of training.
        router_curve: loss of the router's own steps, where rounds alternate.
    """

    model: FissileForCausalLM
    curve: list[float]
    before: float
    after: float
    norms: list[float]
    tokens: int
    seconds: float
    router_curve: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Lesson:
    """Windows, the teacher's targets on them, and the loss of a model.

    Attributes:
        teacher: holds the windows too.
        settings: weights and temperature of the loss, batch, precision.
        seed: of the order of windows after the first pass, which keeps theirs.
        workers: processes that share every batch.
    """

    teacher: Teacher
    settings: Recover
    seed: int
    workers: Workers

    @property
    def size(self) -> int:
        """Windows of one batch, those of all processes."""
        count, tokens = self.teacher.ids_NS.shape
        return max(1, min(count, self.settings.batch_tokens // tokens))

    @property
    def step_tokens(self) -> int:
        """Tokens of one optimiser step."""
        return self.size * self.teacher.ids_NS.shape[1] * self.settings.accumulate

    def batch(self, number: int) -> Tensor:
        """Indices of a batch's windows, int64: all windows in turn, then again in another order."""
        count = len(self.teacher.ids_NS)
        places = range(number * self.size, (number + 1) * self.size)
        orders = {0: torch.arange(count)}
        for epoch in {place // count for place in places} - {0}:
            orders[epoch] = torch.randperm(count, generator=step_generator(self.seed, epoch))
        return torch.stack([orders[place // count][place % count] for place in places])

    def own(self, windows: Tensor) -> tuple[Tensor, float]:
        """This process's part of a batch, and its weight in the mean over processes."""
        own = windows[self.workers.rank :: self.workers.count]
        return own, len(own) * self.workers.count / len(windows)

    def loss(self, model: Callable[..., Any], windows: Tensor) -> Tensor:
        """Mean loss over this process's part of some windows, weighted for the mean over all."""
        own, weight = self.own(windows)
        ids_BS = self.teacher.ids_NS[own].to(self.workers.device)
        targets = self.teacher(windows, own) if self.settings.kd_weight else None
        with precision(self.settings, self.workers)():
            logits_BSV = model(input_ids=ids_BS, use_cache=False).logits
        kd, t = self.settings.kd_weight, self.settings.temperature
        return distill_loss(logits_BSV, targets, ids_BS, kd_weight=kd, temperature=t) * weight

    @torch.no_grad()
    def judge(self, model: Callable[..., Any]) -> float:
        """Mean loss over all windows in float32; every process computes the same."""
        alone = Lesson(
            self.teacher,
            self.settings.model_copy(update={"precision": "float32"}),
            self.seed,
            Workers.alone(self.workers.device),
        )
        losses = [
            float(alone.loss(model, part)) * len(part)
            for part in torch.arange(len(self.teacher.ids_NS)).split(self.size)
        ]
        return sum(losses) / len(self.teacher.ids_NS)


def precision(settings: Recover, workers: Workers) -> Callable[[], AbstractContextManager[None]]:
    """Context of a forward pass: bfloat16 products where the settings ask for them."""
    kind, low = workers.device.type, settings.precision == "bfloat16"
    return partial(torch.autocast, kind, torch.bfloat16, enabled=low)


def train_to_teacher(
    student: FissileForCausalLM,
    teacher: nn.Module,
    ids_NS: Tensor,
    settings: Recover,
    *,
    seed: int,
    checkpoint: Path | None = None,
    targets: UnitStore | None = None,
    norms: Sequence[float] | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> Recovered:
    """Train the converted model to predict what the dense one does.

    Every eighth window only judges: the caller keeps the result if the loss on those has fallen.

    Args:
        student: converted model with float weights; changed in place.
        teacher: dense model, called as teacher(input_ids=...).logits.
        ids_NS: int64 windows without padding.
        settings: method ("lora" or "full"), budget, batch, loss, schedule.
        seed: of the adapters' initial weights and of the order of windows.
        checkpoint: resumable state, see `training.train`.
        targets: where the teacher's logits are kept; models trained on the same windows share it.
        norms: gradient norms of an earlier run, for the refined schedule; without them it spends
            `settings.probe` of the budget on finding some.
        progress: called as (stage, done, total, detail).
        workers: processes that call this together; each takes its share of every batch, and the
            result is that of one process.

    Raises:
        UsageError: a batch holds fewer windows than there are processes, rounds of router
            training without a router, or a way to cut the weights that is not known here.
        QualityGate: the loss is not finite.
    """
    workers = workers or Workers()
    fit, judge = lessons(teacher, ids_NS, settings, seed, targets, workers)
    cut = _place(student, teacher, settings, workers)
    before = judge.judge(student)
    model, chosen = _trainable(student, settings, seed)
    with ready_to_train(model):
        curve, router_curve = _optimise(model, chosen, fit, norms, checkpoint, progress)
    if settings.method == "lora":
        model = model.merge_and_unload()
    model.requires_grad_(False).eval()
    after = judge.judge(model)
    teacher.to("cpu")
    return Recovered(
        unsharded(model) if cut else model.to("cpu"),
        curve.losses,
        before,
        after,
        curve.norms,
        len(curve.losses) * fit.step_tokens,
        curve.seconds + router_curve.seconds,
        router_curve.losses,
    )


def _place(
    student: FissileForCausalLM, teacher: nn.Module, settings: Recover, workers: Workers
) -> bool:
    """Put both models where they compute; whether the student is cut over the processes."""
    if cut := shards(settings, workers):
        shard(student, workers)
    else:
        student.to(workers.device)
    if workers.main or not settings.teacher_top_k:
        # The others read what it has predicted.
        teacher.to(workers.device)
    return cut


def lessons(
    teacher: Callable[..., Any],
    ids_NS: Tensor,
    settings: Recover,
    seed: int,
    targets: UnitStore | None,
    workers: Workers,
) -> tuple[Lesson, Lesson]:
    """What is trained on, in the order of the first pass, and what judges: every eighth window."""
    held = torch.tensor([is_held_out(window) for window in range(len(ids_NS))])
    judge_NS, fit_NS = (ids_NS[held], ids_NS[~held]) if held.any() else (ids_NS, ids_NS)
    order = torch.randperm(len(fit_NS), generator=step_generator(seed, 0))
    made = []
    for windows_NS in (fit_NS[order], judge_NS):
        held_by = Teacher(
            teacher,
            windows_NS,
            top_k=settings.teacher_top_k,
            temperature=settings.temperature,
            store=targets,
            batch_tokens=settings.batch_tokens,
            workers=workers,
            context=precision(settings, workers),
        )
        made.append(Lesson(held_by, settings, seed, workers))
    fit, judge = made
    if fit.size < workers.count:
        raise UsageError(
            f"recover.batch_tokens {settings.batch_tokens} holds {fit.size} windows of "
            f"{ids_NS.shape[1]} tokens, fewer than the {workers.count} processes"
        )
    return fit, judge


def _trainable(
    student: FissileForCausalLM, settings: Recover, seed: int
) -> tuple[Any, dict[str, nn.Parameter]]:
    """The model with its adapters, if any, and what is trained, by name."""
    model: Any = student.requires_grad_(False)
    if settings.method == "lora":
        model = _with_adapters(student, settings.rank, seed)
    else:
        student.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ROUTER_PARTS):
            # The load-balance bias takes part in the choice alone: no loss reaches it.
            learns = settings.train_router or settings.alternate.rounds > 0
            parameter.requires_grad_(learns and not name.endswith(".balance"))
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


def _optimise(
    model: Any,
    chosen: dict[str, nn.Parameter],
    fit: Lesson,
    norms: Sequence[float] | None,
    checkpoint: Path | None,
    progress: Progress | None,
) -> tuple[Curve, Curve]:
    """Train all together, or in rounds; the curve, and that of the router's own steps."""
    settings = fit.settings
    run: Callable[..., Curve] = partial(
        train,
        checkpoint_every=settings.checkpoint_every,
        stage="recover",
        workers=fit.workers,
    )
    if settings.alternate.rounds:
        return alternate(model, chosen, fit, run, checkpoint=checkpoint, progress=progress)
    model.train()
    run = partial(run, chosen, lambda number: fit.loss(model, fit.batch(number)))
    plan = _plan(fit, run, chosen, norms, checkpoint)
    return run(plan, checkpoint=checkpoint, progress=progress), Curve()


def _plan(
    fit: Lesson,
    run: Callable[..., Curve],
    chosen: dict[str, nn.Parameter],
    norms: Sequence[float] | None,
    checkpoint: Path | None,
) -> TrainSettings:
    """Budget and schedule; the refined one is found by a probe unless norms are given."""
    settings = fit.settings
    steps, seconds = settings.steps_of(fit.step_tokens), settings.seconds
    plan = TrainSettings(
        steps,
        settings.learning_rate,
        seconds=seconds,
        schedule="linear",
        warmup=settings.warmup,
        phi=settings.phi,
        accumulate=settings.accumulate,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
    )
    if settings.schedule != "refined":
        return replace(plan, schedule=settings.schedule)
    if norms is None:
        share = settings.probe
        first = max(2, round(share * steps)) if steps else None
        probe = replace(plan, steps=first, seconds=seconds * share if seconds else None)
        start = {name: p.detach().clone() for name, p in chosen.items()}
        path = checkpoint and checkpoint.with_name(f"{checkpoint.stem}.probe{checkpoint.suffix}")
        norms = run(probe, checkpoint=path).norms
        for name, parameter in chosen.items():
            parameter.data.copy_(start[name])
        # The budget is that of both.
        steps = max(1, steps - (first or 0)) if steps else None
        seconds = seconds * (1 - share) if seconds else None
    table = tuple(refined_table(norms))
    return replace(plan, steps=steps, seconds=seconds, schedule="refined", table=table)


def _with_adapters(student: FissileForCausalLM, rank: int, seed: int) -> Any:
    """Low-rank adapters on attention, shared projections and stacked experts."""
    linears = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear)
        and ".layers." in name
        and not any(part in f".{name}." for part in ROUTER_PARTS)
    ]
    stacks = [
        name for name, p in student.named_parameters() if ".mlp.experts." in name and p.ndim == 3
    ]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=linears,
        target_parameters=stacks or None,
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(student, config)
