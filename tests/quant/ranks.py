"""What test_distributed.py compares: quantizations by this process, or by all of a launch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from fissile.config import Quantize
from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.quant.layers import quantize_model
from fissile.run.nesting import nested_solver
from fissile.workers import Workers, join_workers

KINDS: dict[str, dict[str, Any]] = {
    # Seven windows: neither of two processes has as much as the other.
    "fast": {"effort": "fast", "widths": [2, 3, 4]},
    "whole": {
        "effort": "fast",
        "widths": [2, 3, 4, 6, 8],
        "blend": 0.5,
        "block": {"steps": 4, "batch_tokens": 128},
        "companding": None,
        "budget": "5bpw",
    },
}


def quantize(model: Path, out: Path, kind: str, workers: Workers) -> None:
    """Quantize a model with made-up text; layers become units of `out`."""
    settings = Quantize.model_validate(KINDS[kind])
    ids_NS = torch.randint(0, 8000, (7, 64), generator=torch.Generator().manual_seed(1))
    layers = quantize_model(
        StreamedModel(CheckpointSource(model)),
        ids_NS,
        nested_solver(settings, 0),
        group_size=32,
        attention=True,
        batch_tokens=128,
        store=UnitStore(out / kind),
        workers=workers,
    )
    assert sum(1 for _ in layers) == 2


if __name__ == "__main__":
    together = join_workers()
    for name in KINDS:
        quantize(Path(sys.argv[1]), Path(sys.argv[2]), name, together)
