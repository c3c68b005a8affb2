"""The most memory that some work takes: CPU memory of this process, or that of a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> int | None:
    """Forget the high-water mark.

    Returns:
        Bytes that are in use now; None where the system does not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Memory that was freed but kept would be used again without being seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def growth(before: int | None, device: torch.device) -> int | None:
    """Bytes by which the most in use since `reset_peak` exceeds what that returned, if anything."""
    cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if cuda else _status("VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _status(key: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
