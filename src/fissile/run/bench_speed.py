"""`fissile bench speed`: what `fissile.eval.speed` measures, with its settings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fissile.config import Strict
from fissile.errors import UsageError
from fissile.eval.speed import find_candidate, measure_speed
from fissile.refactor.training import Progress
from fissile.run.bench import Bench


class SpeedBench(Strict):
    """Models, batches and rounds; the defaults take under a minute for small models."""

    models: tuple[str, ...] = Field(
        (), description="folders, each with @BITS where a width is to be served"
    )
    batches: tuple[Annotated[int, Field(gt=0)], ...] = (1, 8, 64)
    prompt: int = Field(128, gt=0, description="tokens of a prompt")
    steps: int = Field(16, gt=0, description="decoded tokens")
    repeats: int = Field(5, gt=0, description="measured rounds")
    warmup: int = Field(1, ge=0, description="rounds before them")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = Field(0, description="of the prompts")


def run(settings: SpeedBench, progress: Progress) -> dict[str, Any]:
    """Tokens per second and memory of models side by side, prefill and decode.

    Args:
        settings: models, batches and rounds.
        progress: called as ("bench", done, total, detail).

    Returns:
        What `measure_speed` returns.

    Raises:
        UsageError: no models, no batches, or a device that is not there.
    """
    if not settings.models or not settings.batches:
        raise UsageError(
            "speed needs models and batches: fissile bench speed DIR [DIR@3 …] --batches 1,8,64"
        )
    import torch

    there = torch.cuda.is_available()
    if settings.device == "cuda" and not there:
        raise UsageError("device cuda: torch sees no GPU")
    device = ("cuda" if there else "cpu") if settings.device == "auto" else settings.device
    options = settings.model_dump(exclude={"models", "device"})
    candidates = [find_candidate(name) for name in settings.models]
    return measure_speed(candidates, device=device, progress=progress, **options)


BENCH = Bench(SpeedBench, run)
