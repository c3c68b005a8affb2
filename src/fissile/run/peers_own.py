"""Our own quantizers in `fissile bench peers`: solved, tuned, decoded and scored."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fissile.config import Baseline, Effort, Quantize
from fissile.io.publish import atomic_write_json
from fissile.refactor.training import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from fissile.io.units import UnitStore
    from fissile.quant.solvers import Solver
    from fissile.run.peers_data import Material

Ours = Literal[Baseline, "nested", "nested-residual"]
_BATCH_TOKENS = 8192
_TUNED = ("dedicated", "nested", "nested-residual")
"""Systems that are trained as a whole at the end, and on text that the model writes itself."""
_TOLD: dict[str, Any] = {"block": {"steps"}, "tune": {"steps"}}
_TOLD |= dict.fromkeys(("effort", "blend", "generated"), True)


@dataclass(frozen=True)
class OwnJob:
    """One quantization by ourselves.

    Attributes:
        system: nested has all widths in one code, nested-residual those of 6 and 8 too; of all
            others a job makes one width.
        effort: None for systems that have none.
        widths: that it makes.
        group_size: inputs that share a scale and a zero.
        seed: of the calibration windows and all else.
    """

    system: Ours
    effort: Effort | None
    widths: tuple[int, ...]
    group_size: int
    seed: int

    def folder(self, root: Path) -> Path:
        """Where its result is kept."""
        effort = f".{self.effort}" if self.effort else ""
        widths = "_".join(map(str, self.widths))
        name = f"{self.system}{effort}.g{self.group_size}"
        return root / "ours" / name / f"{widths}_bits" / f"seed_{self.seed}"

    def settings(self, tokens: int, precision: str) -> Quantize:
        """As a recipe has them.

        Args:
            tokens: of the calibration text.
            precision: of the products in training.
        """
        given: dict[str, Any] = {"widths": self.widths, "group_size": self.group_size}
        given |= {"effort": self.effort} if self.effort else {}
        trained = {"precision": precision}
        given |= {"tokens": tokens, "block": trained, "tune": trained}
        if self.system not in _TUNED:
            given |= {"generated": 0, "tune": {"steps": 0}}
        return Quantize.model_validate(given)


def read_own(job: OwnJob, root: Path) -> dict[int, dict[str, Any]] | None:
    """What `score_own` found, by width; None if it has not run to its end."""
    path = job.folder(root) / "score.json"
    if not path.exists():
        return None
    return {int(k): row for k, row in json.loads(path.read_text(encoding="utf-8")).items()}


def score_own(
    job: OwnJob, material: Material, progress: Progress, precision: str = "float32"
) -> dict[int, dict[str, Any]]:
    """Quantize unless that is done, and score every width; a job that was stopped goes on.

    Args:
        job: what to run.
        material: model, text and measure.
        progress: called as (stage, done, total, detail).
        precision: of the products in training, float32 or bfloat16.

    Returns:
        Width to gap, perplexity by domain, bits per weight, and seconds of all widths together
        where one process did the whole job.
    """
    from fissile.io.units import UnitStore
    from fissile.quant.layers import final_layer
    from fissile.run.nesting import decoded, loaded_bits
    from fissile.run.tuning import Tuning

    if (kept := read_own(job, material.root)) is not None:
        return kept
    folder, settings = job.folder(material.root), job.settings(material.tokens, precision)
    whole = not (folder / "units").exists()
    store = UnitStore(folder / "units")
    began, processor = time.perf_counter(), time.process_time()
    solver = _solver(job, settings)
    ids_NS, count = quantized(material, settings, solver, job.seed, store, progress)
    if settings.tune.steps:
        windows = f"seed_{job.seed}_{len(ids_NS)}_windows"
        targets = UnitStore(material.root / "teacher" / windows)
        Tuning(material.source, ids_NS, settings, job.seed, targets, progress).run(
            material.source, store
        )
    spent = {"seconds": time.perf_counter() - began}
    spent["processor_seconds"] = time.process_time() - processor
    rows: dict[int, dict[str, Any]] = {}
    solved = [final_layer(store, i) for i in range(count)]
    for bits in job.widths:
        rows[bits] = material.score(decoded(material.source, iter(solved), bits), job.seed)
        rows[bits]["bits_per_weight"] = loaded_bits(solved, bits)
        rows[bits] |= {"settings": settings.model_dump(include=_TOLD)} if job.effort else {}
        rows[bits] |= spent if whole else {}
    atomic_write_json(folder / "score.json", rows)
    return rows


def quantized(
    material: Material,
    settings: Quantize,
    solver: Solver,
    seed: int,
    store: UnitStore,
    progress: Progress,
) -> tuple[Tensor, int]:
    """Quantize the model of a bench into a store; what is there already is not done again.

    Args:
        material: model and text.
        settings: of the quantization.
        solver: that they ask for.
        seed: of the windows.
        store: of the layers.
        progress: called as (stage, done, total, detail).

    Returns:
        Windows int64 (N, S), those that the model wrote among them, and the number of layers.
    """
    from fissile.io.units import UnitStore
    from fissile.models.stream import StreamedModel
    from fissile.quant.layers import quantize_model
    from fissile.run.generated import with_generated

    given_NS, _ = material.windows(seed)
    text = UnitStore(material.root / "text" / f"seed_{seed}")
    source, times = material.source, settings.generated
    ids_NS = with_generated(source, given_NS, times, seed, text, progress)
    layers = quantize_model(
        StreamedModel(source),
        ids_NS,
        solver,
        group_size=settings.group_size,
        attention=True,
        batch_tokens=_BATCH_TOKENS,
        store=store,
        progress=progress,
    )
    return ids_NS, sum(1 for _ in layers)


def _solver(job: OwnJob, settings: Quantize) -> Solver:
    from fissile.run.nesting import baseline_solver, nested_solver

    if job.system == "nested" or job.system == "nested-residual":
        return nested_solver(settings, job.seed)
    return baseline_solver(job.system, job.widths[0], settings, job.seed)
