"""Quantization in several processes against one that is limited to one core.

Every process computes with one thread on a core of its own and solves the layers of a made-up dense
model, as the quantize stage of a run does. Starting the processes and reading the model is not
timed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import Field

from fissile.config import Effort, Quantize, Strict
from fissile.errors import LostProcess, UsageError
from fissile.eval.result import machine, versions
from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.quant.layers import quantize_model
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.nesting import nested_solver
from fissile.workers import join_workers

_WORDS = "from fissile.run.bench_ranks import work; work()"


class RanksBench(Strict):
    """Shape of the model and effort of the solver."""

    processes: int = Field(2, ge=2, description="that share the work, each on a core")
    width: int = Field(512, ge=64, multiple_of=64, description="of the model")
    neurons: int = Field(1408, ge=64, multiple_of=64, description="FFN width")
    layers: int = Field(1, ge=1, description="of the model")
    tokens: int = Field(8192, ge=512, description="calibration tokens")
    context: int = Field(512, ge=8, description="tokens of a window")
    effort: Effort = "balanced"
    seed: int = Field(0, description="of weights and text")


def bench_ranks(settings: RanksBench, progress: Progress) -> dict[str, Any]:
    """Quantize a made-up model in one process on one core, and in several on as many cores.

    Args:
        settings: sizes and effort.
        progress: called as (stage, done, total, detail).

    Returns:
        Wall and processor seconds of both ways (the processor's of the busiest process), their
        ratios, the largest difference of a tensor's loss, conditions.

    Raises:
        UsageError: fewer cores than processes.
        LostProcess: a process failed.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < settings.processes:
        raise UsageError(f"{settings.processes} processes need as many cores, found {len(cores)}")
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        _write_model(settings, Path(folder))
        one = _measured(settings, Path(folder), cores[:1])
        progress("ranks", 1, 2, f"one process {one['seconds']:.1f} s")
        many = _measured(settings, Path(folder), cores[: settings.processes])
        progress("ranks", 2, 2, f"{settings.processes} processes {many['seconds']:.1f} s")
    pairs = list(zip(one.pop("losses"), many.pop("losses"), strict=True))
    return {
        "one": one,
        "shared": many,
        "speedup": one["seconds"] / many["seconds"],
        "processor_ratio": one["processor_seconds"] / many["processor_seconds"],
        "loss_difference": max(abs(a - b) / a for a, b in pairs),
        "conditions": {
            **settings.model_dump(),
            "counted": "quantization of all layers; one thread a process",
            "load_average": {"before": load, "after": os.getloadavg()[0]},
            **machine(),
            "versions": versions(),
        },
    }


def _write_model(settings: RanksBench, folder: Path) -> None:
    """A dense model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=settings.width,
        intermediate_size=settings.neurons,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // 64,
        num_key_value_heads=settings.width // 64,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        LlamaForCausalLM(config).save_pretrained(folder)


def _measured(settings: RanksBench, folder: Path, cores: list[int]) -> dict[str, Any]:
    """Start a process on each core; what the main one reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(len(cores)),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = [sys.executable, "-c", _WORDS, settings.model_dump_json(), str(folder)]
    started = []
    for rank, core in enumerate(cores):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipe = subprocess.PIPE
        args = [*words, str(core)]
        started.append(subprocess.Popen(args, env=common | own, stdout=pipe, stderr=pipe))
    outputs = [process.communicate() for process in started]
    for process, (_, err) in zip(started, outputs, strict=True):
        if process.returncode:
            lines = err.decode(errors="replace").strip().splitlines() or ["no message"]
            raise LostProcess(f"a process of the benchmark failed: {lines[-1]}")
    found: dict[str, Any] = json.loads(outputs[0][0].splitlines()[-1])
    return found


def work() -> None:
    """One process: quantize the model of the second argument on the core of the third."""
    settings, folder = RanksBench.model_validate_json(sys.argv[1]), Path(sys.argv[2])
    os.sched_setaffinity(0, {int(sys.argv[3])})
    torch.set_num_threads(1)
    workers = join_workers()
    quantize = Quantize.model_validate({"effort": settings.effort})
    model, rng = StreamedModel(CheckpointSource(folder)), torch.Generator().manual_seed(0)
    ids_NS = torch.randint(
        0, 1024, (settings.tokens // settings.context, settings.context), generator=rng
    )
    workers.wait()
    began, used = time.perf_counter(), time.process_time()
    layers = quantize_model(
        model,
        ids_NS,
        nested_solver(quantize, settings.seed),
        group_size=64,
        attention=True,
        batch_tokens=2048,
        store=UnitStore(),
        workers=workers,
    )
    losses = [x for layer in layers for row in layer.losses.values() for x in row.values()]
    seconds = time.perf_counter() - began
    busy = torch.zeros(workers.count, dtype=torch.float64)
    busy[workers.rank] = time.process_time() - used
    workers.sum_([busy])
    row = {"seconds": seconds, "processor_seconds": float(busy.max()), "losses": losses}
    sys.stdout.write(json.dumps(row) + "\n")


BENCH = Bench(RanksBench, bench_ranks)
