"""What this machine has to offer: memory, disk, processors; read without torch."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and statistics of the container's memory, version 2 and version 1."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes a process can still take without swapping, within the container's limit if any.

    Args:
        root: where /proc and /sys are, for tests.

    Returns:
        None where the system does not say.
    """
    found = [value for value in (_meminfo(root, "MemAvailable"), _cgroup_free(root)) if value]
    return min(found) if found else None


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory the machine has, or None where the system does not say."""
    return _meminfo(root, "MemTotal")


def free_disk(path: Path) -> int:
    """Free bytes on the disk where `path` is or would be created."""
    path = Path(os.path.abspath(path))
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def processors() -> int:
    """Processors this process may use, at most OMP_NUM_THREADS."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(count, int(asked))) if asked.isdecimal() else count


def _meminfo(root: Path, field: str) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return None


def _cgroup_free(root: Path) -> int | None:
    for names in _CGROUPS:
        limit, used, stat = (root / name.lstrip("/") for name in names)
        try:
            most, now = limit.read_text("ascii").strip(), int(used.read_text("ascii"))
            # Cached file pages count as used, but are given back on demand.
            pairs = (line.split() for line in stat.read_text("ascii").splitlines())
            cached = int(dict(p for p in pairs if len(p) == 2).get("inactive_file", 0))
        except (OSError, ValueError):
            continue
        if most != "max":
            return max(0, int(most) - now + cached)
    return None
