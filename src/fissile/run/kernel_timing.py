"""Timing of GPU kernels: replays of CUDA graphs over rotated buffers, and the machine's ceilings.

A decoding step reads every layer's weights once, so a graph runs the same product on several
distinct weights, together four times the cache: nothing is found in it again, and what lies between
launches counts as it does in a model. Without a GPU nothing is timed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

_CACHES = 4
_SETS = 512


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Median and least seconds of one replay of a CUDA graph that runs all calls in order.

    Args:
        calls: allocate nothing that must outlive a replay; all are run twice before the capture.
        repeats: replays that are measured, after three that are not.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    seconds = []
    for turn in range(3 + repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 3:
            seconds.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(seconds), min(seconds)


def seconds_per_call(calls: Sequence[Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Median and least seconds of one call of several; arguments as for `graph_seconds`."""
    median, least = graph_seconds(calls, repeats)
    return median / len(calls), least / len(calls)


def cache_bytes() -> int:
    """Size of the GPU's last cache."""
    return int(torch.cuda.get_device_properties().L2_cache_size)


def sets_needed(read_bytes: float, held_bytes: float, device: str, most_bytes: int) -> int:
    """Distinct weights to rotate over: what they read is four times the cache, if memory allows.

    Args:
        read_bytes: of one weight by one call; of a stack only the chosen experts count.
        held_bytes: of one weight.
        device: "cuda" or "cpu" (where two are enough).
        most_bytes: that all sets may take.
    """
    if device != "cuda":
        return 2
    wanted = math.ceil(_CACHES * cache_bytes() / read_bytes)
    return int(max(1, min(max(2, wanted), _SETS, most_bytes // held_bytes)))


def ceilings(device: str, repeats: int) -> dict[str, float | None]:
    """What this device reaches at best: copying, reading, bf16 products, an empty kernel.

    Returns:
        copy_TBps, read_TBps, bf16_TFs and empty_kernel_us; None where nothing was measured.
    """
    names = ("copy_TBps", "read_TBps", "bf16_TFs", "empty_kernel_us")
    if device != "cuda":
        return dict.fromkeys(names)
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = graph_seconds([lambda: target.copy_(source)], repeats)[0]
    words = source.view(torch.int32)
    read = graph_seconds([lambda: words.sum()], repeats)[0]
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = graph_seconds([lambda: a @ b], repeats)[0]
    one = torch.zeros(1, device=device)
    empty = graph_seconds([lambda: one.add_(1)] * 64, repeats)[0] / 64
    values = (2 * source.numel() / copy, source.numel() / read, 2 * 8192**3 / product)
    return dict(zip(names, (*(v / 1e12 for v in values), empty * 1e6), strict=True))


def launches(call: Callable[[], object]) -> int:
    """Kernels that one call launches."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    kinds: list[Any] = [event.device_type for event in profile.events()]
    return sum(kind == torch.autograd.DeviceType.CUDA for kind in kinds)


def poison(size: int, device: str) -> None:
    """Leave NaN in the memory that the next results are likely to be put in.

    Args:
        size: elements of the result.
        device: of the result.
    """
    held = [
        torch.full((size,), float("nan"), dtype=dtype, device=device)
        for dtype in (torch.bfloat16, torch.float32)
        for _ in range(2)
    ]
    del held
