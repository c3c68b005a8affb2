"""A recipe from beginning to end, and the quantization stage on its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from fissile import __version__
from fissile.config import Quantize, Recipe, Stage
from fissile.errors import QualityGate, UsageError
from fissile.io.hub import describe_source, resolve_source
from fissile.io.publish import atomic_write_bytes, atomic_write_json, clean_leftovers
from fissile.run.context import (
    Progress,
    RunContext,
    locked,
    logged,
    stop_on_signals,
)
from fissile.run.journal import Journal
from fissile.run.ledger import Ledger
from fissile.run.plan import make_plan
from fissile.run.together import earlier_norms, follow, follows

if TYPE_CHECKING:
    from fissile.models.source import CheckpointSource
    from fissile.run.measure import Measurements
    from fissile.workers import Workers


@dataclass(frozen=True)
class RunSummary:
    """What a run leaves behind.

    Attributes:
        out: the run folder.
        model: the artifact, if it was exported.
        report: the report page, if it was written.
        stages: name, seconds and peak memory of every stage.
        ledger: number of events by kind.
    """

    out: Path
    model: Path | None
    report: Path | None
    stages: list[dict[str, Any]]
    ledger: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {
            "out": str(self.out),
            "model": str(self.model) if self.model else None,
            "report": str(self.report) if self.report else None,
            "stages": self.stages,
            "ledger": self.ledger,
        }


def run_recipe(
    recipe: Recipe,
    source: str,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    stop_after: str | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> RunSummary:
    """Convert a model by a recipe.

    Args:
        recipe: what to do.
        source: dense checkpoint: a folder, or a hub id with `download`.
        out: run folder.
        resume: continue an earlier run of the same recipe and source.
        overwrite: discard an earlier run.
        stop_after: end after this stage.
        download: allow a hub id.
        progress: called as (stage, done, total, detail).

    Raises:
        UsageError: folder, recipe or source do not fit.
        UnsupportedModel: the model cannot be converted.
        ResourceError: not enough memory or disk.
        QualityGate: a limit of the recipe was missed, or verification failed.
        Interrupted: a signal asked for a stop.
    """
    if stop_after is not None and stop_after not in get_args(Stage):
        raise UsageError(f"stage {stop_after!r} is not one of {', '.join(get_args(Stage))}")
    folder = resolve_source(source, download=download)
    plan = make_plan(recipe, folder, out, stop_after=stop_after)
    plan.check()
    from fissile.models.source import CheckpointSource

    checkpoint = CheckpointSource(folder)
    earlier_norms(recipe)
    from fissile.workers import join_workers

    workers = join_workers()
    with workers.one_voice():
        if not workers.main:
            follow(workers, lambda: _context(recipe, checkpoint, out, workers, resume=True))
            return RunSummary(out, None, None, [], {})
        with locked(out):
            how = {"resume": resume, "overwrite": overwrite}
            context = _context(recipe, checkpoint, out, workers, progress, **how)
            clean_leftovers(out / "model")
            text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
            atomic_write_bytes(out / "recipe.yaml", text.encode())
            atomic_write_json(out / "plan.json", plan.to_dict())
            with logged(out), stop_on_signals(context.stop):
                summary = _run_stages(context, stop_after)
            workers.call(None)
            return summary


def _context(
    recipe: Recipe,
    checkpoint: CheckpointSource,
    out: Path,
    workers: Workers,
    progress: Progress | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RunContext:
    identity = {
        "fissile": __version__,
        "source": describe_source(checkpoint.headers)["headers_sha256"],
        "config": checkpoint.headers.config,
        "recipe": recipe.model_dump(mode="json"),
    }
    journal = Journal(out, identity, resume=resume, overwrite=overwrite)
    ledger = Ledger.from_csv(out / "ledger.csv")
    return RunContext(recipe, checkpoint, out, journal, ledger, progress or _silent, workers)


def _silent(_stage: str, _done: int, _total: int, _detail: str) -> None:
    """Progress for callers that want none."""


def _run_stages(context: RunContext, stop_after: str | None) -> RunSummary:
    from fissile.run.measure import Measurements
    from fissile.run.metrics import assemble
    from fissile.run.report import write_report
    from fissile.run.stages import Stages

    recipe, stages = context.recipe, Stages(context)
    model = context.out / "model"
    records: dict[str, dict[str, Any]] = {}

    def evaluate() -> dict[str, Any]:
        return _evaluate(context, Measurements(context, stages))

    def verify() -> dict[str, Any]:
        from fissile.export.verify import verify as check

        report = check(model, against=context.source.folder, progress=context.tick)
        if not report.ok:
            failed = [c for c in report.checks if not c.ok]
            raise QualityGate(f"{model}: {failed[0].name}: {failed[0].detail}")
        return report.to_dict()

    def report() -> dict[str, Any]:
        metrics = assemble(context, records)
        atomic_write_json(context.out / "metrics.json", metrics)
        page, _ = write_report(context.out)
        return {"page": str(page)}

    converts, nests = recipe.extract.enabled, recipe.quantize.enabled
    work: list[tuple[Stage, bool, Callable[[], dict[str, Any]]]] = [
        ("calibrate", converts, stages.calibrate),
        ("extract", converts, stages.extract),
        ("route", converts and recipe.route.kind != "static", stages.route),
        ("recover", converts, stages.recover),
        ("quantize", nests, stages.quantize),
        ("tune", nests and recipe.quantize.tune.steps > 0, stages.tune),
        ("export", True, stages.export),
        ("verify", True, verify),
        ("evaluate", True, evaluate),
        ("report", True, report),
    ]
    for name, wanted, function in work:
        if wanted:
            records[name] = context.stage(name, function, keep=name != "report")
        if name == stop_after:
            break
    context.ledger.enforce(recipe.limits.ledger)
    _enforce_quality(recipe, records.get("evaluate"))
    page = context.out / "report.html"
    return RunSummary(
        context.out,
        model if model.exists() else None,
        page if page.exists() else None,
        stage_rows(records),
        context.ledger.counts(),
    )


def _evaluate(context: RunContext, measurements: Measurements) -> dict[str, Any]:
    from fissile.run.gates import check_gates, gate_events

    record = measurements.run()
    gates = check_gates(context.recipe.limits, record)
    events = [*measurements.answers.events, *gate_events(gates)]
    context.ledger.replace_stage("evaluate", events)
    return record | {"gates": [gate.model_dump() for gate in gates]}


def stage_rows(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds and peak memory of every stage, in order."""
    keys = ("seconds", "peak_rss_bytes")
    return [{"name": name, **{k: r[k] for k in keys}} for name, r in records.items()]


def _enforce_quality(recipe: Recipe, record: dict[str, Any] | None) -> None:
    from fissile.run.gates import GateRow, enforce_gates

    if record is None:
        return
    enforce_gates([GateRow(**row) for row in record["gates"]])
    limit = recipe.limits.max_ppl_ratio
    if limit is None:
        return
    own = [w for w in record["widths"] if w.get("of", "converted") == "converted"]
    served = [w for w in own if w["method"] in ("float", "nested")]
    if not served:
        return
    best = min(w["ppl"] for w in served)
    ratio = best / record["dense"]["ppl"]
    if ratio > limit:
        raise QualityGate(
            f"perplexity is {ratio:.3f} times the dense model's, limits.max_ppl_ratio is {limit}"
        )


def quantize_checkpoint(
    source: str,
    out: Path,
    *,
    quantize: Quantize,
    data: Path | None = None,
    seed: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    download: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Bit-nest the weights of a dense or routed float model; the artifact is `out` itself.

    Args:
        source: the model: a folder, or a hub id with `download`.
        out: folder of the artifact.
        quantize: widths, group size, effort.
        data: calibration text; this installation's own text without it.
        seed: of the sampling.
        resume: continue an interrupted call with the same arguments.
        overwrite: replace an existing artifact.
        download: allow a hub id.
        progress: called as (stage, done, total, detail).

    Returns:
        Folder, bytes, seconds, mean relative loss per width, ledger counts; nothing if not main.

    Raises:
        UsageError, UnsupportedModel, ResourceError, QualityGate, Interrupted: as `run_recipe`.
    """
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists; pass --overwrite to replace it, or another --out")
    recipe = quantize_recipe(quantize, data, seed)
    work = out.with_name(f".{out.name}.run")
    summary = run_recipe(
        recipe,
        source,
        work,
        resume=resume,
        overwrite=overwrite and not resume,
        stop_after="verify",
        download=download,
        progress=progress,
    )
    if follows():
        return {}
    losses = _mean_losses(work)
    if out.exists():
        shutil.rmtree(out)
    assert summary.model is not None
    summary.model.rename(out)
    shutil.rmtree(work)
    return {
        "out": str(out),
        "bytes": sum(p.stat().st_size for p in out.iterdir()),
        "seconds": round(sum(row["seconds"] for row in summary.stages), 1),
        "relative_loss": losses,
        "ledger": summary.ledger,
    }


def quantize_recipe(quantize: Quantize, data: Path | None, seed: int) -> Recipe:
    """The recipe behind `quantize_checkpoint`: every stage but the last ones that it needs, off."""
    return Recipe.model_validate(
        {
            "name": "quantize",
            "seed": seed,
            "calibrate": {"tokens": quantize.tokens, "data": str(data) if data else None},
            "extract": {"enabled": False},
            "quantize": quantize.model_dump(),
            "evaluate": {"controls": [], "baselines": []},
        }
    )


def _mean_losses(work: Path) -> dict[str, float]:
    import json

    rows = json.loads((work / "journal" / "quantize.json").read_text())["layers"]
    widths = sorted({width for row in rows for width in row["loss"]})
    return {w: sum(row["loss"][w] for row in rows) / len(rows) for w in widths}
