"""`fissile bench peers`: our quantizers beside those of others, on one model, text and measure."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fissile.config import Effort
from fissile.errors import CorruptCheckpoint, Interrupted, UsageError
from fissile.io.publish import atomic_write_bytes, atomic_write_json
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.context import stop_on_signals
from fissile.run.peers import RECIPES, Job, Peer, quantize, read_result, read_weights, replaced
from fissile.run.peers_data import Material, TextSettings, conditions_of, hold_to, read_material
from fissile.run.peers_own import Ours, OwnJob, score_own
from fissile.run.peers_table import Measured, table

Group = Literal[32, 64, 128]
NestedWidth = Literal[2, 3, 4]
_NO_ENVIRONMENT = "no environment was named: --set environment=DIR builds one"
_SEARCHED = ("nested", "nested-residual", "dedicated", "decoupleq")


class PeersBench(TextSettings):
    """Model, text, widths, seeds and systems; by default all that takes minutes."""

    environment: str | None = Field(
        None, description="folder with the peers; built if it does not exist; null: no peers"
    )
    peers: tuple[Peer, ...] = ("hqq", "auto-round", "gptqmodel-gptq", "gptqmodel-gptaq")
    ours: tuple[Ours, ...] = ("dedicated", "decoupleq", "gptq", "gptaq", "rtn", "nested")
    efforts: tuple[Effort, ...] = Field(
        ("balanced",), description="of nested and dedicated; of decoupleq the first"
    )
    widths: tuple[NestedWidth, ...] = (2, 3, 4)
    group_sizes: tuple[Group, ...] = Field((64,), description="inputs per scale and zero")
    peer_group_sizes: tuple[Group, ...] = Field(
        (), description="of the peers: smaller ones give them as many bits; left out: group_sizes"
    )
    seeds: tuple[int, ...] = Field((0, 1, 2), description="of calibration text and all else")
    threads: int = Field(1, gt=0, description="of a peer")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of our products in training; what is trained stays float32"
    )


def run(settings: PeersBench, progress: Progress) -> dict[str, Any]:
    """Quantizers of others beside ours: ln ppl over the dense model's, and bits per weight.

    One job is one quantization. Its score is on disk as soon as it exists, the table is written
    anew after each, and the same command goes on with what is missing.

    Args:
        settings: see there.
        progress: called as (stage, done, total, detail).

    Returns:
        "rows" (see `table`), "dense" (perplexity by seed), and "conditions". The folder holds the
        table as peers.md and the plot as peers.svg.

    Raises:
        UsageError: no model, nothing to do, or a folder with results of another model or text.
        Interrupted: a signal; what is finished is kept.
    """
    from fissile.eval.result import machine, versions
    from fissile.run.peers_plot import markdown, plot

    material = _material(settings)
    root = material.root
    conditions = {**conditions_of(material), "precision": settings.precision}
    hold_to(root, conditions)
    reasons = _missing_packages(settings, progress)
    jobs, stop = list(_jobs(settings)), threading.Event()
    measured: list[Measured] = []
    for done, job in enumerate(jobs, start=1):
        with stop_on_signals(stop):
            if isinstance(job, OwnJob):
                show = partial(_tick, progress, stop)
                measured += own_rows(job, score_own(job, material, show, settings.precision))
                label = f"{job.system} {list(job.widths)} bits, seed {job.seed}"
            else:
                found = _score(job, settings, material, reasons.get(RECIPES[job.peer].package))
                measured.append(Measured((job.peer, None, job.bits, job.group_size), found))
                label = f"{job.peer} {job.bits} bits, seed {job.seed}"
        if stop.is_set():
            raise Interrupted(f"stopped at {job.folder(root)}; the same command continues")
        atomic_write_bytes(root / "peers.md", markdown(table(measured)).encode())
        progress("peers", done, len(jobs), label)
    rows = table(measured)
    atomic_write_bytes(root / "peers.svg", plot(rows))
    ppl = {str(seed): material.dense(seed)["ppl"] for seed in settings.seeds}
    told = {**conditions, "seeds": list(settings.seeds), "versions": versions(), **machine()}
    return {"rows": rows, "dense": ppl, "conditions": told}


def _material(settings: PeersBench) -> Material:
    """Model and text, all checked before any work."""
    if not settings.seeds or not settings.widths:
        raise UsageError("peers needs widths and seeds")
    if "nested-residual" in settings.ours and 4 not in settings.widths:
        raise UsageError(f"widths {list(settings.widths)}: nested-residual adds 6 and 8 bits to 4")
    return read_material(settings)


def _missing_packages(settings: PeersBench, progress: Progress) -> dict[str, str]:
    """Packages of the peers that cannot be used, and why."""
    from fissile.run.peers_env import ensure

    packages = sorted({RECIPES[peer].package for peer in settings.peers})
    if settings.environment is None or not packages:
        return dict.fromkeys(packages, _NO_ENVIRONMENT)
    return ensure(Path(settings.environment), packages, progress)


def _jobs(settings: PeersBench) -> Iterator[OwnJob | Job]:
    """All quantizations: seed after seed, width after width, several widths in one code last."""
    peer_groups = settings.peer_group_sizes or settings.group_sizes
    nested = [name for name in settings.ours if name.startswith("nested")]
    single = [name for name in settings.ours if name not in nested]
    for seed in settings.seeds:
        for bits in settings.widths:
            for group in settings.group_sizes:
                for name in single:
                    for effort in _efforts(settings, name):
                        yield OwnJob(name, effort, (bits,), group, seed)
            for group in peer_groups:
                for peer in settings.peers:
                    yield Job(peer, bits, group, seed)
        for group in settings.group_sizes:
            for name in nested:
                more = (6, 8) if name == "nested-residual" else ()
                for effort in _efforts(settings, name):
                    yield OwnJob(name, effort, (*settings.widths, *more), group, seed)


def _efforts(settings: PeersBench, name: Ours) -> tuple[Effort | None, ...]:
    if name not in _SEARCHED:
        return (None,)
    return settings.efforts[:1] if name == "decoupleq" else settings.efforts


def _tick(
    progress: Progress, stop: threading.Event, stage: str, done: int, total: int, detail: str
) -> None:
    """Show where a job of ours is; stop there if that was asked for."""
    progress(stage, done, total, detail)
    if stop.is_set():
        raise Interrupted(f"stopped at {stage} {done} of {total}; the same command continues")


def own_rows(job: OwnJob, found: dict[int, dict[str, Any]]) -> Iterator[Measured]:
    """A job of ours as single measurements of the table."""
    for bits, row in found.items():
        yield Measured((job.system, job.effort, bits, job.group_size), row)


def _score(
    job: Job, settings: PeersBench, material: Material, reason: str | None
) -> dict[str, Any]:
    """Run a peer unless it ran before, and score it unless it was; or say why there is nothing."""
    folder, root = job.folder(material.root), material.root
    if (folder / "score.json").exists():
        return dict(json.loads((folder / "score.json").read_text(encoding="utf-8")))
    if read_result(job, root) is None:
        if reason is None and settings.environment is not None:
            _, tokens = material.windows(job.seed)
            environment = Path(settings.environment)
            model = material.source.folder
            reason = quantize(job, root, model, tokens, environment, settings.threads)
        if reason is not None:
            return {"missing": reason}
    try:
        weights, bits_per_weight = read_weights(job, root)
        found = material.score(replaced(material.source, weights), job.seed)
    except CorruptCheckpoint as err:
        return {"missing": str(err)}
    result = read_result(job, root) or {}
    keys = ("seconds", "processor_seconds", "settings", "versions")
    found |= {"bits_per_weight": bits_per_weight, **{k: result[k] for k in keys}}
    atomic_write_json(folder / "score.json", found)
    return found


BENCH = Bench(PeersBench, run)
