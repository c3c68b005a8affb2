"""`fissile bench peers`: our quantizers beside those of others, on one model, text and measure."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fissile.config import Baseline, Recipe, Strict
from fissile.errors import CorruptCheckpoint, Interrupted, UsageError
from fissile.io.publish import atomic_write_bytes, atomic_write_json
from fissile.recipe_files import parse_recipe
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.context import stop_on_signals
from fissile.run.metrics import Metrics, read_metrics
from fissile.run.peers import (
    RECIPES,
    Job,
    Peer,
    gap_of,
    quantize,
    read_result,
    read_weights,
    replaced,
)
from fissile.run.peers_table import Measured, table

Ours = Literal[Baseline, "nested"]
Group = Literal[32, 64, 128]
NestedWidth = Literal[2, 3, 4]
_NO_ENVIRONMENT = "no environment was named: --set environment=DIR builds one"


class PeersBench(Strict):
    """Model, text, widths, seeds and systems; by default all that takes minutes."""

    models: tuple[str, ...] = Field((), description="the dense model's folder")
    environment: str | None = Field(
        None, description="folder with the peers; built if it does not exist; null: no peers"
    )
    calibration: str | None = Field(None, description="JSONL; default this installation's text")
    held_out: str | None = Field(None, description="JSONL; default this installation's text")
    peers: tuple[Peer, ...] = ("hqq", "auto-round", "gptqmodel-gptq", "gptqmodel-gptaq")
    ours: tuple[Ours, ...] = ("nested", "dedicated", "gptq", "rtn", "gptaq", "decoupleq")
    efforts: tuple[Literal["fast", "balanced", "best"], ...] = Field(
        ("balanced",), description="of nested and dedicated; of decoupleq the first"
    )
    widths: tuple[NestedWidth, ...] = (2, 3, 4)
    group_sizes: tuple[Group, ...] = Field((64,), description="inputs per scale and zero")
    seeds: tuple[int, ...] = Field((0, 1, 2), description="of calibration text and all else")
    tokens: int = Field(65536, gt=0, description="calibration tokens")
    context: int = Field(512, ge=8, description="tokens of a window")
    held_out_tokens: int = Field(65536, gt=0, description="over all domains, divided evenly")
    folder: str = Field("runs/peers", description="results, kept and resumed")
    threads: int = Field(1, gt=0, description="of a peer")


def run(settings: PeersBench, progress: Progress) -> dict[str, Any]:
    """Quantizers of others beside ours: ln ppl over the dense model's, and bits per weight.

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
    from fissile.eval.documents import read_documents, sha256_files
    from fissile.eval.result import machine, model_sha256, versions
    from fissile.models.source import CheckpointSource
    from fissile.run.peers_plot import markdown, plot

    if len(settings.models) != 1 or not settings.seeds or not settings.widths:
        raise UsageError("peers needs a model, widths and seeds: fissile bench peers MODEL_DIR")
    root = Path(settings.folder)
    source = CheckpointSource(Path(settings.models[0]))
    if source.artifact:
        raise UsageError(f"{source.folder}: is an artifact; peers quantize a dense float model")
    settings = settings.model_copy(update={"models": (str(source.folder),)})
    for given in (settings.calibration, settings.held_out):
        if given is not None:
            read_documents(Path(given))
    settings = _with_text(settings, root)
    names = ("calibration", "held_out")
    conditions = {
        "model_sha256": model_sha256(source.folder),
        "text_sha256": {k: sha256_files([Path(getattr(settings, k))]) for k in names},
        **settings.model_dump(include={"tokens", "context", "held_out_tokens"}),
    }
    _same_conditions(root, conditions)
    own = [(seed, *_own(settings, seed, progress)) for seed in settings.seeds]
    dense = {seed: metrics for seed, metrics, _ in own}
    measured = [m for _, _, rows in own for m in rows]
    measured += _theirs(settings, root, dense, progress)
    rows = table(measured)
    atomic_write_bytes(root / "peers.md", markdown(rows).encode())
    atomic_write_bytes(root / "peers.svg", plot(rows))
    ppl = {str(s): m.dense.ppl for s, m in dense.items() if m.dense is not None}
    told = {**conditions, "seeds": list(settings.seeds), "versions": versions(), **machine()}
    return {"rows": rows, "dense": ppl, "conditions": told}


def _with_text(settings: PeersBench, root: Path) -> PeersBench:
    """The settings with files of text."""
    if settings.calibration and settings.held_out:
        return settings
    from fissile.eval.corpus import build_corpus

    corpus = build_corpus(root / "corpus")
    given = {"calibration": corpus.calibration, "held_out": corpus.heldout}
    missing = {k: str(path) for k, path in given.items() if getattr(settings, k) is None}
    return settings.model_copy(update=missing)


def _same_conditions(root: Path, conditions: dict[str, Any]) -> None:
    path = root / "conditions.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key, value in conditions.items() if kept.get(key) != value]
        if other:
            raise UsageError(f"{root}: holds results with another {', '.join(other)}")
    root.mkdir(parents=True, exist_ok=True)
    atomic_write_json(path, conditions)


# -- ours ----------------------------------------------------------------------------------------


def _recipe(settings: PeersBench, seed: int, group: int, effort: str, ours: list[str]) -> Recipe:
    evaluate = {
        "data": settings.held_out,
        "tokens": settings.held_out_tokens,
        "context": settings.context,
        "controls": [],
        "baselines": [name for name in ours if name != "nested"],
        "choices": 0,
    }
    calibrate = {
        "data": settings.calibration,
        "tokens": settings.tokens,
        "context": settings.context,
    }
    widths = list(settings.widths)
    solve = {
        "enabled": bool(ours),
        "widths": widths,
        "group_size": group,
        "effort": effort,
        "tokens": settings.tokens,
    }
    return parse_recipe(
        {
            "name": "peers",
            "seed": seed,
            "calibrate": calibrate,
            "extract": {"enabled": False},
            "quantize": solve,
            "export": {"default_bits": widths[-1]},
            "evaluate": evaluate,
        }
    )


def _own(settings: PeersBench, seed: int, progress: Progress) -> tuple[Metrics, list[Measured]]:
    """Metrics of the first run of a seed, and our systems of all its runs."""
    from fissile.run.pipeline import run_recipe

    rows: list[Measured] = []
    first: Metrics | None = None
    for group in settings.group_sizes:
        for effort in settings.efforts:
            names: list[str] = list(settings.ours)
            if effort != settings.efforts[0]:
                names = [name for name in names if name in ("nested", "dedicated")]
            out = Path(settings.folder) / "ours" / f"{effort}.g{group}" / f"seed_{seed}"
            resume = (out / "recipe.yaml").exists()
            recipe = _recipe(settings, seed, group, effort, names)
            run_recipe(recipe, settings.models[0], out, resume=resume, progress=progress)
            metrics = read_metrics(out / "metrics.json")
            first = first or metrics
            rows += own_rows(metrics, names, group, effort)
    assert first is not None
    return first, rows


def own_rows(metrics: Metrics, names: list[str], group: int, effort: str) -> Iterator[Measured]:
    """Our systems of one run, as rows of the table."""
    assert metrics.dense is not None
    spent = {row.name: row.seconds for row in metrics.stages}
    for w in metrics.widths:
        if w.method not in names or w.bits is None:
            continue
        found: dict[str, Any] = {
            "gap": gap_of(w.by_domain, metrics.dense.by_domain),
            "by_domain": w.by_domain,
            "bits_per_weight": w.bits_per_weight,
        }
        if w.method == "nested":
            # All widths together.
            found["seconds"] = spent["quantize"] + spent.get("tune", 0.0)
        searched = w.method in ("nested", "dedicated", "decoupleq")
        yield Measured((w.method, effort if searched else None, w.bits, group), found)


# -- theirs --------------------------------------------------------------------------------------


def _theirs(
    settings: PeersBench, root: Path, dense: Mapping[int, Metrics], progress: Progress
) -> list[Measured]:
    """Every peer at every width, group size and seed; a reason where there is no result."""
    from fissile.run.peers_env import ensure

    packages = sorted({RECIPES[peer].package for peer in settings.peers})
    if settings.environment is None:
        reasons = dict.fromkeys(packages, _NO_ENVIRONMENT)
    else:
        reasons = ensure(Path(settings.environment), packages, progress)
    jobs = [
        Job(peer, bits, group, seed)
        for seed in settings.seeds
        for group in settings.group_sizes
        for peer in settings.peers
        for bits in settings.widths
    ]
    rows, stop = [], threading.Event()
    for done, job in enumerate(jobs, start=1):
        with stop_on_signals(stop):
            found = _score(
                job, settings, root, dense[job.seed], reasons.get(RECIPES[job.peer].package)
            )
        if stop.is_set():
            raise Interrupted(f"stopped at {job.folder(root)}; the same command continues")
        rows.append(Measured((job.peer, None, job.bits, job.group_size), found))
        progress("peers", done, len(jobs), f"{job.peer} {job.bits} bits, seed {job.seed}")
    return rows


def _score(
    job: Job, settings: PeersBench, root: Path, dense: Metrics, reason: str | None
) -> dict[str, Any]:
    """Run a peer unless it ran before, and score it unless it was; or say why there is nothing."""
    folder = job.folder(root)
    if (folder / "score.json").exists():
        return dict(json.loads((folder / "score.json").read_text(encoding="utf-8")))
    if read_result(job, root) is None:
        if reason is None and settings.environment is not None:
            tokens = _tokens(settings, root, job.seed)
            environment = Path(settings.environment)
            model = Path(settings.models[0])
            reason = quantize(job, root, model, tokens, environment, settings.threads)
        if reason is not None:
            return {"missing": reason}
    try:
        found = _measure(job, settings, root, dense)
    except CorruptCheckpoint as err:
        return {"missing": str(err)}
    atomic_write_json(folder / "score.json", found)
    return found


def _tokens(settings: PeersBench, root: Path, seed: int) -> Path:
    """Calibration windows of a seed, those that our own systems see too."""
    from safetensors.torch import save

    from fissile.eval.documents import read_documents
    from fissile.eval.tokens import load_tokenizer
    from fissile.eval.windows import sample_windows
    from fissile.models.source import CheckpointSource

    path = root / f"tokens_{seed}.safetensors"
    if not path.exists():
        source = CheckpointSource(Path(settings.models[0]))
        assert settings.calibration is not None
        ids_NS, _, _ = sample_windows(
            read_documents(Path(settings.calibration)),
            load_tokenizer(source.folder),
            settings.tokens,
            min(settings.context, source.config.max_position_embeddings),
            seed,
            config=source.config,
        )
        atomic_write_bytes(path, save({"ids": ids_NS.contiguous()}))
    return path


def _measure(job: Job, settings: PeersBench, root: Path, dense: Metrics) -> dict[str, Any]:
    """Decode a finished job and score it on the windows that the dense model was scored on."""
    from fissile.eval.documents import read_documents
    from fissile.eval.perplexity import measure, prepare
    from fissile.eval.tokens import load_tokenizer
    from fissile.models.source import CheckpointSource, load_source

    source = CheckpointSource(Path(settings.models[0]))
    weights, bits_per_weight = read_weights(job, root)
    model = load_source(replaced(source, weights))
    assert settings.held_out is not None
    assert dense.dense is not None
    held_out = prepare(
        source.config,
        load_tokenizer(source.folder),
        read_documents(Path(settings.held_out)),
        context=min(settings.context, source.config.max_position_embeddings),
        tokens=settings.held_out_tokens,
        seed=job.seed,
    )
    score = measure(model, held_out).score()
    if score["document_tokens"] != dense.dense.document_tokens:
        raise UsageError(f"{root}: the dense model was scored on other documents")
    result = read_result(job, root) or {}
    return {
        "gap": gap_of(score["by_domain"], dense.dense.by_domain),
        "by_domain": score["by_domain"],
        "bits_per_weight": bits_per_weight,
        **{k: result[k] for k in ("seconds", "processor_seconds", "settings", "versions")},
    }


BENCH = Bench(PeersBench, run)
