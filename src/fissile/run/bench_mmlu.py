"""Speed of MMLU beside lm-evaluation-harness."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field

import fissile
from fissile.config import Strict
from fissile.run.bench import Bench

DEMO_MODEL = Path(fissile.__file__).resolve().parent / "recipes" / "demo" / "model"


class MmluSettings(Strict):
    """By default: the demo model, 12 questions per subject made of this installation's text."""

    model: str | None = Field(None, description="model folder; the demo model if absent")
    data: str | None = Field(None, description="MMLU data with all 57 subjects")
    shots: list[int] = Field(default=[0, 5], description="examples before a question, in turn")
    limit: int = Field(12, ge=1, description="questions per subject")
    batch_tokens: int = Field(2048, ge=1, description="padded tokens per forward pass")
    batch_sizes: list[int] = Field(default=[4, 16, 64], description="sizes the harness may use")
    repeats: int = Field(1, ge=1, description="runs of each side, in turn; the fastest counts")


def bench_mmlu(
    settings: MmluSettings, progress: Callable[[str, int, int, str], None]
) -> dict[str, Any]:
    """seconds and memory of MMLU beside lm-evaluation-harness's, and whether the answers agree.

    Args:
        settings: see there.
        progress: called as (stage, done, total, detail).
    """
    from fissile.eval.mmlu_bench import compare_speed
    from fissile.eval.mmlu_set import build_mmlu

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(settings.data or f"{scratch}/installed-text")
        if settings.data is None:
            from fissile.eval.corpus import build_corpus

            build_mmlu(build_corpus(data).heldout, data, per_subject=settings.limit)
        rows = [
            compare_speed(
                Path(settings.model) if settings.model else DEMO_MODEL,
                data,
                shots=shots,
                limit=settings.limit,
                batch_tokens=settings.batch_tokens,
                batch_sizes=settings.batch_sizes,
                repeats=settings.repeats,
                progress=progress,
            )
            for shots in settings.shots
        ]
    return {"rows": rows}


BENCH = Bench(MmluSettings, bench_mmlu)
