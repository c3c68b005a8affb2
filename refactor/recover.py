"""Training after the conversion: LoRA or all weights, towards the dense model's own predictions.

Shapes: N windows, S tokens per window, B windows of one step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fissile.config import Recover
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.stream import batches
from fissile.refactor.compensate import is_held_out
from fissile.refactor.training import Progress, TrainSettings, step_generator, train

ROUTER_PARTS = (".router.", ".selector.")


@dataclass(frozen=True)
class Recovered:
    """A trained model and what it achieved.

    Attributes:
        model: adapters merged, evaluation mode.
        curve: loss of every step.
        before: loss on the held-out windows without the training.
        after: the same with it.
    """

    model: FissileForCausalLM
    curve: list[float]
    before: float
    after: float


def distill_loss(student_BSV: Tensor, teacher_BSV: Tensor, temperature: float) -> Tensor:
    """Forward KL(teacher || student) per token, times temperature squared; a scalar in nats."""
    log_q = torch.log_softmax(student_BSV.float() / temperature, dim=-1).flatten(0, 1)
    log_p = torch.log_softmax(teacher_BSV.float() / temperature, dim=-1).flatten(0, 1)
    loss = nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return loss * temperature**2


def train_to_teacher(
    student: FissileForCausalLM,
    teacher: nn.Module,
    ids_NS: Tensor,
    settings: Recover,
    *,
    seed: int,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Recovered:
    """Train the converted model to predict what the dense one does.

    Every eighth window only judges: the caller keeps the result if the loss on those has fallen.

    Args:
        student: converted model with float weights; changed in place.
        teacher: dense model, called as teacher(input_ids=...).logits.
        ids_NS: int64 windows without padding.
        settings: method ("lora" or "full"), steps, batch, learning rate, temperature.
        seed: of the adapters' initial weights and of the order of windows.
        checkpoint: resumable state, see `training.train`.
        progress: called as (stage, done, total, detail).

    """
    held = torch.tensor([is_held_out(window) for window in range(len(ids_NS))])
    judge_NS, ids_NS = (ids_NS[held], ids_NS[~held]) if held.any() else (ids_NS, ids_NS)
    before = _divergence(student, teacher, judge_NS, settings)
    student.requires_grad_(False)
    model: Any = student
    if settings.method == "lora":
        model = _with_adapters(student, settings.rank, seed)
    else:
        student.requires_grad_(True)
    for name, parameter in model.named_parameters():
        if any(part in name for part in ROUTER_PARTS):
            parameter.requires_grad_(settings.train_router)
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
    size = max(1, min(len(ids_NS), settings.batch_tokens // ids_NS.shape[1]))
    model.train()

    def loss_of(step: int) -> Tensor:
        pick = torch.randperm(len(ids_NS), generator=step_generator(seed, step))[:size]
        with torch.no_grad():
            wanted = teacher(input_ids=ids_NS[pick], use_cache=False).logits
        got = model(input_ids=ids_NS[pick], use_cache=False).logits
        return distill_loss(got, wanted, settings.temperature)

    curve = train(
        chosen,
        loss_of,
        TrainSettings(settings.steps, settings.learning_rate),
        checkpoint=checkpoint,
        checkpoint_every=settings.checkpoint_every,
        progress=progress,
        stage="recover",
    )
    if settings.method == "lora":
        model = model.merge_and_unload()
    model.requires_grad_(False).eval()
    return Recovered(model, curve, before, _divergence(model, teacher, judge_NS, settings))


@torch.no_grad()
def _divergence(student: nn.Module, teacher: nn.Module, ids_NS: Tensor, settings: Recover) -> float:
    """Mean training loss over windows, the model in evaluation mode."""
    total = 0.0
    for part in batches(ids_NS, settings.batch_tokens):
        got, wanted = (
            m(input_ids=ids_NS[part], use_cache=False).logits for m in (student, teacher)
        )
        total += float(distill_loss(got, wanted, settings.temperature)) * len(ids_NS[part])
    return total / len(ids_NS)


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
