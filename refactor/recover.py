"""Training after the conversion: LoRA or all weights, towards the dense model's own predictions.

Shapes: N windows, S tokens per window, B windows of one step, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fissile.config import Recover
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.refactor.training import Progress, TrainSettings, step_generator, train

ROUTER_PARTS = (".router.", ".selector.")


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
) -> tuple[FissileForCausalLM, list[float]]:
    """Train the converted model to predict what the dense one does.

    Args:
        student: converted model with float weights; changed in place.
        teacher: dense model, called as teacher(input_ids=...).logits.
        ids_NS: int64 windows without padding.
        settings: method ("lora" or "full"), steps, batch, learning rate, temperature.
        seed: of the adapters' initial weights and of the order of windows.
        checkpoint: resumable state, see `training.train`.
        progress: called as (stage, done, total, detail).

    Returns:
        The trained model, adapters merged, in evaluation mode; and the loss of every step.
    """
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
    return model.requires_grad_(False).eval(), curve


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
