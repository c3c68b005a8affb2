"""Tokens per second and memory of models side by side, in one process on one machine.

Prefill: one forward pass over a batch of prompts, from nothing to their cache and the logits of the
last position. Decode: greedy single-token steps that follow, each reading the cache of all before.
Every round measures every model once, and the next round begins with the next model, so that what
the machine does meanwhile falls on all of them alike. The first rounds warm up and do not count.

Memory: bytes of weights as they are held, and the working memory of a phase on top of what was
resident before it. On a GPU that is the allocator's own count; on Linux without one it is the
kernel's high-water mark, after freed memory was handed back where the C library can do that.

Shapes: B batch, S tokens of a prompt.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.errors import UsageError
from fissile.eval import memory
from fissile.eval.result import code, machine, model_sha256, versions
from fissile.eval.run import check_bits, default_bits, load_model, model_folder, read_config
from fissile.eval.tokens import model_limits

Phase = Literal["prefill", "decode"]
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Args:
        name: as it was asked for.
        folder: of the model.
        config: its parsed config.json.
        bits: width to serve, None for the artifact's own or float weights.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    bits: int | None


@dataclass
class _Times:
    seconds: dict[Phase, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    working: dict[Phase, int | None] = field(default_factory=dict)

    def add(self, phase: Phase, seconds: float, working: int | None) -> None:
        self.seconds[phase].append(seconds)
        before = self.working.get(phase)
        self.working[phase] = working if before is None else max(before, working or 0)


def find_candidate(name: str) -> Candidate:
    """Resolve "DIR" or "DIR@BITS" without reading weights.

    Args:
        name: a model, an artifact or a run folder, and the width to serve.

    Raises:
        UsageError: no such folder, or a width that it does not hold.
        CorruptCheckpoint: its config.json does not parse.
    """
    path, _, width = (
        name.rpartition("@") if "@" in name and not Path(name).exists() else (name, "", "")
    )
    if width and not width.isdecimal():
        raise UsageError(f"{name}: expected DIR or DIR@BITS, e.g. {path}@3")
    bits = int(width) if width else None
    folder = model_folder(Path(path))
    config = read_config(folder)
    check_bits(folder, config, bits)
    return Candidate(name, folder, config, bits)


def measure_speed(
    candidates: Sequence[Candidate],
    *,
    batches: Sequence[int] = (1, 8, 64),
    prompt: int = 128,
    steps: int = 16,
    repeats: int = 5,
    warmup: int = 1,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure models against each other.

    Args:
        candidates: from `find_candidate`; all are held in memory at once.
        batches: sequences processed together, B.
        prompt: tokens of a prompt, S; drawn at random, the same for every model of one vocabulary.
        steps: decoded tokens.
        repeats: measured rounds.
        warmup: rounds before them.
        device: of torch.
        dtype: of what is not packed.
        seed: of the prompts.
        progress: called with ("bench", rounds done, rounds, detail).

    Returns:
        "rows": one for each model, phase and batch, with the median tokens per second, the slowest
        and fastest round, all seconds, working_bytes and weights_bytes; and "conditions".

    Raises:
        UsageError: a prompt and steps that are longer than a model's maximum.
    """
    _check_length(candidates, prompt + steps)
    load_before = _load_average()
    models = [
        load_model(c.folder, c.config, c.bits).to(device=device, dtype=getattr(torch, dtype))
        for c in candidates
    ]
    times = {(i, batch): _Times() for batch in batches for i in range(len(models))}
    for done, (batch, turn) in enumerate(product(batches, range(warmup + repeats)), start=1):
        if turn == 0:
            gc.collect()
        for i in rotated(len(models), turn):
            ids_BS = _prompts(models[i].config, batch, prompt, seed).to(device)
            for phase, seconds, working in _round(models[i], ids_BS, steps):
                if turn >= warmup:
                    times[i, batch].add(phase, seconds, working)
        if progress is not None:
            progress("bench", done, len(batches) * (warmup + repeats), f"batch {batch}")
    tokens = {"prefill": prompt, "decode": steps}
    rows = [
        _row(candidates[i], models[i], phase, batch, batch * tokens[phase], times[i, batch])
        for batch in batches
        for phase in times[0, batch].seconds
        for i in range(len(models))
    ]
    asked = {"prompt": prompt, "steps": steps, "repeats": repeats, "warmup": warmup, "seed": seed}
    return {"rows": rows, "conditions": asked | _conditions(device, dtype, load_before)}


def _conditions(device: str, dtype: str, load_before: list[float] | None) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "order": "rotating",
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "load_average": {"before": load_before, "after": _load_average()},
        "code": code(),
        "versions": versions(),
        **machine(),
    }


def rotated(count: int, turn: int) -> list[int]:
    """Order of the models in a round: every one is first equally often."""
    return [(turn + i) % count for i in range(count)]


def _round(model: Any, ids_BS: Tensor, steps: int) -> Iterator[tuple[Phase, float, int | None]]:
    """One prefill and what follows it; yields phase, seconds and working memory."""
    state: dict[str, Any] = {}

    def prefill() -> None:
        state["out"] = model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)

    def decode() -> None:
        out = state["out"]
        for _ in range(steps):
            next_B1 = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=next_B1, past_key_values=out.past_key_values, use_cache=True)
        out.logits[0, -1, 0].item()  # waits for a GPU

    phases: tuple[tuple[Phase, Callable[[], None]], ...] = (
        ("prefill", prefill),
        ("decode", decode),
    )
    for phase, work in phases:
        with torch.inference_mode():
            before = memory.reset_peak(ids_BS.device)
            began = time.perf_counter()
            work()
            if ids_BS.is_cuda:
                torch.cuda.synchronize(ids_BS.device)
            seconds = time.perf_counter() - began
        yield phase, seconds, memory.growth(before, ids_BS.device)


def _row(
    candidate: Candidate, model: Any, phase: Phase, batch: int, tokens: int, times: _Times
) -> dict[str, Any]:
    seconds = times.seconds[phase]
    bits = candidate.bits if candidate.bits is not None else default_bits(candidate.config)
    return {
        "model": candidate.name,
        "model_sha256": model_sha256(candidate.folder),
        "type": candidate.config.get("model_type"),
        "bits": bits,
        "phase": phase,
        "batch": batch,
        "tokens": tokens,
        "tokens_per_second": tokens / statistics.median(seconds),
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
        "seconds": [round(value, 6) for value in seconds],
        "working_bytes": times.working[phase],
        "weights_bytes": weights_bytes(model),
    }


def weights_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers; shared storage counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def _prompts(config: Any, batch: int, prompt: int, seed: int) -> Tensor:
    vocab = model_limits(config)[0] or 256
    rng = random.Random(f"{seed}/{batch}")
    return torch.tensor([[rng.randrange(vocab) for _ in range(prompt)] for _ in range(batch)])


def _check_length(candidates: Sequence[Candidate], length: int) -> None:
    for one in candidates:
        fields = {**(one.config.get("text_config") or {}), **one.config}
        longest = fields.get("max_position_embeddings")
        if isinstance(longest, int) and length > longest:
            raise UsageError(
                f"{one.name}: prompt and steps are {length} tokens, the model's maximum is"
                f" {longest}"
            )


def _load_average() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
