"""MMLU's speed and memory beside lm-evaluation-harness's on the same machine, model and data.

Each side runs in a process of its own. The clock covers prompts, tokens, forward passes and
averages; loading the model, the data and the harness's task files is outside. Memory is what the
process grows by while the clock runs. The answers are compared item by item.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from fissile.errors import FissileError
from fissile.eval import memory
from fissile.eval.harness import evaluate_tasks, load_tasks
from fissile.eval.harness_mmlu import write_tasks
from fissile.eval.mmlu import mmlu
from fissile.eval.mmlu_data import read_mmlu
from fissile.eval.perplexity import Progress
from fissile.eval.result import code, machine, model_sha256, versions
from fissile.eval.run import load_model, model_folder, read_config
from fissile.eval.tokens import load_tokenizer, tokenizer_sha256

Side = Literal["fissile", "lm_eval"]
_PILOT = 1
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Args:
        side: whose code runs.
        folder: the model.
        data: questions and examples.
        shots: examples before every question.
        limit: questions per subject.
        batch: padded tokens of a pass (fissile), or sequences (lm_eval).
        threads: of tensor arithmetic.
    """

    side: Side
    folder: Path
    data: Path
    shots: int
    limit: int | None
    batch: int
    threads: int


def compare_speed(
    folder: Path,
    data: Path,
    *,
    shots: int,
    limit: int | None,
    batch_tokens: int,
    batch_sizes: Sequence[int],
    repeats: int,
    progress: Progress,
) -> dict[str, Any]:
    """Measure both sides in turn and compare their answers.

    Args:
        folder: a model folder.
        data: all 57 subjects, in a layout that `read_mmlu` takes.
        shots: examples before every question.
        limit: questions per subject.
        batch_tokens: of ours.
        batch_sizes: of the harness; the one that is fastest on one question per subject is taken.
        repeats: runs of each side, in turn; the fastest counts.
        progress: called with ("bench", done, total, what).

    Returns:
        The row: `shots`, `n_items`, `n_truncated` and its share, per side `seconds`, `cpu_seconds`,
        `peak_bytes` (None where the system does not say) and `batch`; `speedup` and `cpu_speedup`
        (harness / ours), `same_choices` (share), `largest_relative_difference` of a
        log-likelihood, and `conditions`.

    Raises:
        FissileError: a side failed; its message is on stderr.
    """
    total = (len(batch_sizes) if len(batch_sizes) > 1 else 0) + 2 * repeats
    done = 0

    def measure(job: Job) -> dict[str, Any]:
        nonlocal done
        progress("bench", done, total, f"{job.side}, {job.shots} shots, batch {job.batch}")
        done += 1
        return _in_process(job)

    ours = Job("fissile", folder, data, shots, limit, batch_tokens, torch.get_num_threads())
    theirs = replace(ours, side="lm_eval", batch=batch_sizes[0])
    if len(batch_sizes) > 1:
        pilots = [replace(theirs, batch=size, limit=_PILOT) for size in batch_sizes]
        theirs = replace(theirs, batch=min(pilots, key=lambda job: measure(job)["seconds"]).batch)
    runs = [(measure(ours), measure(theirs)) for _ in range(repeats)]
    progress("bench", total, total, "")
    conditions = _conditions(ours, batch_sizes, repeats)
    return {"shots": shots, **_row(runs), "conditions": conditions}


def _row(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """The fastest run of each side, and both compared."""
    best = [min((run[side] for run in runs), key=lambda r: r["seconds"]) for side in (0, 1)]
    kept = ("seconds", "cpu_seconds", "peak_bytes", "batch")
    return {
        "n_items": len(best[0]["items"]),
        "n_truncated": best[0]["n_truncated"],
        "share_truncated": best[0]["n_truncated"] / len(best[0]["items"]),
        "fissile": {key: best[0][key] for key in kept},
        "lm_eval": {key: best[1][key] for key in kept},
        "speedup": round(best[1]["seconds"] / best[0]["seconds"], 2),
        "cpu_speedup": round(best[1]["cpu_seconds"] / best[0]["cpu_seconds"], 2),
        **compare_items(best[0]["items"], best[1]["items"]),
    }


def compare_items(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Share of equal choices, and the largest relative difference of a log-likelihood.

    Args:
        ours: id to the log-likelihood of each choice.
        theirs: the same ids.
    """
    same, largest = 0, 0.0
    for key, values in theirs.items():
        same += values.index(max(values)) == ours[key].index(max(ours[key]))
        pairs = zip(ours[key], values, strict=True)
        largest = max(largest, *(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs))
    return {"same_choices": same / len(theirs), "largest_relative_difference": largest}


def harness_items(found: dict[str, Any]) -> dict[str, list[float]]:
    """Log-likelihoods by item id (subject/number) from the harness's samples."""
    items = {}
    for task, samples in found["samples"].items():
        subject = task.removeprefix("mmlu_").removesuffix("_continuation")
        for number, sample in enumerate(sorted(samples, key=lambda s: s["doc_id"]), start=1):
            items[f"{subject}/{number}"] = [float(r[0]) for r in sample["filtered_resps"]]
    return items


def _conditions(job: Job, batch_sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    folder = model_folder(job.folder)
    return {
        "data": {"file": job.data.name, "sha256": read_mmlu(job.data).sha256()},
        "model": {
            "type": read_config(folder).get("model_type"),
            "sha256": model_sha256(folder),
        },
        "tokenizer_sha256": tokenizer_sha256(folder),
        "limit": job.limit,
        "dtype": "float32",
        "batch_sizes_tried": list(batch_sizes),
        "repeats": repeats,
        "clock": "prompts to averages; loading of model, data and task files excluded",
        "memory": "growth of the resident set while the clock runs",
        "code": code(),
        "versions": {**versions(), "lm_eval": metadata.version("lm_eval")},
        **machine(),
        "threads": job.threads,
        "load_average": [round(value, 1) for value in os.getloadavg()],
    }


def _in_process(job: Job) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        process = multiprocessing.get_context("spawn").Process(
            target=measure_job, args=(job, Path(scratch) / "tasks", out)
        )
        process.start()
        process.join()
        if process.exitcode != 0 or not out.is_file():
            raise FissileError(f"the process of {job.side} ended with {process.exitcode}")
        return dict(json.loads(out.read_text(encoding="utf-8")))


def measure_job(job: Job, scratch: Path, out: Path) -> None:
    """Measure one side in this process and write what was found as JSON.

    Args:
        job: what to measure.
        scratch: folder for the harness's task files; made if absent.
        out: file to write: `Job`'s fields, seconds, cpu_seconds, peak_bytes, items.
    """
    torch.set_num_threads(job.threads)
    logging.disable(logging.WARNING)
    score = _ours(job) if job.side == "fissile" else _theirs(job, scratch)
    before = memory.reset_peak(_CPU)
    wall, cpu = time.perf_counter(), time.process_time()
    found = score()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    grown = memory.growth(before, _CPU)
    numbers = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": grown}
    out.write_text(json.dumps({**asdict(job), **numbers, **found}, default=str), encoding="utf-8")


def _ours(job: Job) -> Callable[[], dict[str, Any]]:
    data, folder = read_mmlu(job.data), model_folder(job.folder)
    model, tokenizer = load_model(folder, read_config(folder)), load_tokenizer(folder)

    def score() -> dict[str, Any]:
        options: dict[str, Any] = {"batch_tokens": job.batch, "limit": job.limit}
        found = mmlu(model, tokenizer, data, shots=job.shots, **options).scored()
        items = {item["id"]: item["loglikelihoods"] for item in found.items}
        return {"items": items, "n_truncated": found.details["n_truncated"]}

    return score


def _theirs(job: Job, scratch: Path) -> Callable[[], dict[str, Any]]:
    from lm_eval.models.huggingface import HFLM

    loaded = load_tasks([write_tasks(job.data, scratch)], scratch, job.shots)
    folder = str(model_folder(job.folder))
    lm = HFLM(folder, dtype="float32", device="cpu", batch_size=job.batch)
    lm.loglikelihood = partial(lm.loglikelihood, disable_tqdm=True)
    return lambda: {"items": harness_items(evaluate_tasks(lm, loaded, job.limit))}
