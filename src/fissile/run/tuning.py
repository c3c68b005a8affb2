"""Scales, zeros and norms of a whole quantized model towards what it should predict.

Towards the dense model's predictions it is the last stage of the quantizer, and an optional one: it
holds all integers in memory. What it changes is kept only where the loss falls on windows that it
never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fissile.config import Quantize, Recover, Tune
from fissile.io.units import UnitStore
from fissile.kernels.layout import STORED_BITS
from fissile.models.stream import StateSource, StreamedModel
from fissile.quant.layers import QuantizedLayer, read_layer, tuned_unit
from fissile.quant.once import draw, mean_bits
from fissile.quant.tune import TunedModel
from fissile.refactor.recover import Lesson, lessons
from fissile.refactor.training import Progress, TrainSettings, step_generator, train
from fissile.workers import Workers

_UNIT = "tuned"


@dataclass(frozen=True, eq=False)
class Tuning:
    """What the floats of a quantized model are trained with, towards the dense model.

    Attributes:
        teacher: the dense model.
        ids_NS: int64 calibration windows.
        settings: of the quantization.
        seed: of the order of windows.
        targets: where the teacher's logits are kept.
        progress: called as (stage, done, total, detail).
    """

    teacher: StateSource
    ids_NS: Tensor
    settings: Quantize
    seed: int
    targets: UnitStore
    progress: Progress

    def run(self, source: StateSource, store: UnitStore) -> dict[str, Any]:
        """Train the floats of the layers in a store; units of what changed go there too.

        Args:
            source: the float model that was quantized.
            store: units that `quantize_model` left.

        Returns:
            Divergence from the teacher on held-out windows, in nats a token, by width, before and
            after; steps and seconds.
        """
        if store.has(_UNIT):
            return store.load(_UNIT)[1]
        layers = [read_layer(store, i) for i in range(source.config.num_base_layers)]
        widths = moving_widths(layers[0].widths)
        if not widths:
            return {"steps": 0, "before": {}, "after": {}}
        settings = self.settings.tune
        norms = settings.norms and widths == layers[0].widths
        tuned = tuned_model(StreamedModel(source), layers, widths, settings, norms, self.seed)
        teacher = StreamedModel(self.teacher)

        def predict(input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=teacher.forward(input_ids))

        record = train_floats(
            tuned,
            float_lessons(settings, self.ids_NS, self.seed, predict, self.targets),
            {bits: self.settings.omega[bits] for bits in widths},
            settings,
            checkpoint=store.path("tuning"),
            progress=self.progress,
            seed=self.seed,
        )
        for i, changed in enumerate(tuned.finish()):
            store.save(tuned_unit(i), changed)
        store.save(_UNIT, {"widths": torch.tensor(widths)}, record)
        return record


def moving_widths(stored: tuple[int, ...]) -> tuple[int, ...]:
    """Widths whose floats may move: six and eight bits are planes upon those of four."""
    below = STORED_BITS + (stored[-1] <= STORED_BITS)
    return tuple(k for k in stored if k < below)


def tuned_model(
    model: StreamedModel,
    layers: Sequence[QuantizedLayer],
    widths: tuple[int, ...],
    settings: Tune,
    norms: bool,
    seed: int,
) -> TunedModel:
    """What moves under these settings; norms serve all widths and stay where a rank is given."""
    norms = norms and settings.rank is None
    return TunedModel(model, layers, widths, norms=norms, rank=settings.rank, seed=seed)


def float_lessons(
    settings: Tune,
    ids_NS: Tensor,
    seed: int,
    teacher: Callable[..., Any] | None,
    targets: UnitStore | None = None,
) -> tuple[Lesson, Lesson]:
    """What floats are trained on, and the eighth of it that only judges.

    Args:
        settings: batch, context, precision.
        ids_NS: int64 windows without padding.
        seed: of their order.
        teacher: called as teacher(input_ids=...).logits; None for the text itself.
        targets: where the teacher's logits are kept.
    """
    context = min(settings.context, ids_NS.shape[1])
    count = ids_NS.shape[1] // context
    lesson = Recover(
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        context=context,
        kd_weight=0.0 if teacher is None else 1.0,
        temperature=1.0,
        teacher_top_k=settings.teacher_top_k,
        precision=settings.precision,
    )
    cut_NS = ids_NS[:, : count * context].reshape(-1, context)
    return lessons(teacher or _nothing, cut_NS, lesson, seed, targets, Workers())


def _nothing(**_: Any) -> Any:
    raise AssertionError("text needs no teacher")


def train_floats(
    tuned: TunedModel,
    taught: tuple[Lesson, Lesson],
    omega: Mapping[int, float],
    settings: Tune,
    *,
    checkpoint: Path | None,
    progress: Progress,
    seed: int = 0,
) -> dict[str, Any]:
    """Train what moves in a model; undo what did not help.

    Args:
        tuned: changed in place.
        taught: what is trained on, and what judges.
        omega: moving widths to the weight of their loss, relative to 4^width.
        settings: steps and rate.
        checkpoint: file to continue from.
        progress: called as (stage, done, total, detail).
        seed: of the widths that are drawn.

    Returns:
        Loss of the windows that judge, by width, before and after; steps and seconds.
    """
    (fit, judge), widths = taught, tuple(omega)
    if settings.period is None:
        loss_of, turns = _widths_in_turn(tuned, fit, omega), len(widths)
    else:
        loss_of, turns = _drawn_widths(tuned, fit, widths, settings.period, seed), 1
    before = _losses(tuned, judge, widths)
    curve = train(
        tuned.parameters(),
        loss_of,
        TrainSettings(settings.steps, settings.learning_rate, accumulate=turns),
        checkpoint=checkpoint,
        checkpoint_every=settings.checkpoint_every,
        progress=progress,
        stage="tune",
    )
    after = _keep(tuned, judge, before)
    return {
        "steps": len(curve.losses),
        "training_seconds": round(curve.seconds, 1),
        "before": {str(bits): loss for bits, loss in before.items()},
        "after": {str(bits): loss for bits, loss in after.items()},
    }


def _widths_in_turn(
    tuned: TunedModel, fit: Lesson, omega: Mapping[int, float]
) -> Callable[[int], Tensor]:
    """A step takes the same windows at every width, one width after the other."""
    widths = tuple(omega)
    weight = {bits: 4.0**bits * omega[bits] for bits in widths}
    share = {bits: len(widths) * weight[bits] / sum(weight.values()) for bits in widths}

    def loss_of(number: int) -> Tensor:
        step, turn = divmod(number, len(widths))
        bits = widths[turn]
        return share[bits] * fit.loss(tuned.at(bits), fit.batch(step))

    return loss_of


def _drawn_widths(
    tuned: TunedModel, fit: Lesson, widths: tuple[int, ...], period: int, seed: int
) -> Callable[[int], Tensor]:
    """A step draws a width for every weight, at a mean that rises and falls."""
    groups = tuned.shared_inputs()

    def loss_of(step: int) -> Tensor:
        mean = mean_bits(step, period, widths)
        first = draw(list(groups), widths, mean, step_generator(seed, step))
        bits = {name: first[key] for key, names in groups.items() for name in names}
        return fit.loss(tuned.at(bits), fit.batch(step))

    return loss_of


def _losses(tuned: TunedModel, judge: Lesson, widths: tuple[int, ...]) -> dict[int, float]:
    """Mean loss of the windows that judge, of every width as it would be stored."""
    return {bits: judge.judge(tuned.at(bits, stored=True)) for bits in widths}


def _keep(tuned: TunedModel, judge: Lesson, before: Mapping[int, float]) -> dict[int, float]:
    """Undo what did not lower the loss of a width; the losses of what is left.

    Norms serve all widths: where some width is worse with them, they go back first.
    """
    widths = tuple(before)
    after = _losses(tuned, judge, widths)
    if tuned.has_norms and any(not after[bits] < before[bits] for bits in widths):
        tuned.revert(None)
        after = _losses(tuned, judge, widths)
    for bits in widths:
        if not after[bits] < before[bits]:
            tuned.revert(bits)
            after[bits] = before[bits]
    return after
