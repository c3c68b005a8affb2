"""What a simulated machine can do, as a small YAML file, and the time that work takes on it."""

from __future__ import annotations

import math
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from fissile.config import Strict
from fissile.errors import UsageError
from fissile.registry import suggest


class Hardware(Strict):
    """Speeds of a machine with experts behind a link; all in bytes, operations and seconds."""

    name: str = Field(min_length=1)
    flops: float = Field(gt=0, description="operations per second that kernels reach")
    memory_bandwidth: float = Field(gt=0, description="bytes per second of the fast memory")
    launch: float = Field(0.0, ge=0, description="seconds per expert or dense part of a layer")
    link_bandwidth: float = Field(gt=0, description="bytes per second from where experts wait")
    link_latency: float = Field(0.0, ge=0, description="seconds per transfer")
    cpu_flops: float | None = Field(
        None, gt=0, description="operations per second where experts wait; none: a disk"
    )
    cpu_bandwidth: float = Field(1e11, gt=0, description="bytes per second of the slow memory")
    cpu_start: float = Field(0.0, ge=0, description="seconds more for a layer's first CPU expert")

    def dense(self, flops: float, bytes_: float) -> float:
        """Seconds of the part of a layer that every token needs; 0 for nothing."""
        busy = max(flops / self.flops, bytes_ / self.memory_bandwidth)
        return busy + self.launch if busy > 0 else 0.0

    def expert(self, flops: float, bytes_: float, tokens: int) -> float:
        """Seconds of one expert in fast memory, for so many tokens."""
        return self.launch + max(flops * tokens / self.flops, bytes_ / self.memory_bandwidth)

    def transfer(self, bytes_: float) -> float:
        """Seconds to bring so many bytes over the link."""
        return self.link_latency + bytes_ / self.link_bandwidth

    def on_cpu(self, flops: float, bytes_: float, tokens: int) -> float:
        """Seconds of one expert where it waits, for so many tokens; infinite on a disk."""
        if self.cpu_flops is None:
            return math.inf
        return max(flops * tokens / self.cpu_flops, bytes_ / self.cpu_bandwidth)


MACHINES: dict[str, Hardware] = {
    machine.name: machine
    for machine in (
        # Half of the dense bf16 peak, four fifths of the memory's, links as they are in practice.
        Hardware(
            name="a100-pcie4",
            flops=1.56e14,
            memory_bandwidth=1.6e12,
            launch=5e-6,
            link_bandwidth=2.5e10,
            link_latency=1e-5,
            cpu_flops=2e12,
            cpu_bandwidth=1.5e11,
            cpu_start=5e-5,
        ),
        Hardware(
            name="h100-pcie5",
            flops=4.5e14,
            memory_bandwidth=2.7e12,
            launch=5e-6,
            link_bandwidth=5.2e10,
            link_latency=1e-5,
            cpu_flops=3e12,
            cpu_bandwidth=2.5e11,
            cpu_start=5e-5,
        ),
        Hardware(
            name="rtx4090-pcie4",
            flops=8e13,
            memory_bandwidth=8e11,
            launch=5e-6,
            link_bandwidth=2.2e10,
            link_latency=1e-5,
            cpu_flops=1e12,
            cpu_bandwidth=6e10,
            cpu_start=5e-5,
        ),
        Hardware(
            name="laptop-nvme",
            flops=3e11,
            memory_bandwidth=4e10,
            launch=2e-5,
            link_bandwidth=3e9,
            link_latency=8e-5,
        ),
    )
}
"""Machines to choose by name: typical speeds, not measurements. Measure your own for a verdict."""


def read_hardware(source: str) -> Hardware:
    """A machine by its name in `MACHINES`, or from a YAML file.

    Args:
        source: the name, or a path ending in .yaml or .yml.

    Raises:
        UsageError: no such machine or file, a field that is unknown, missing or out of range.
    """
    if source in MACHINES:
        return MACHINES[source]
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        known = list(MACHINES)
        raise UsageError(
            f"hardware {source!r}: not a .yaml file and none of {', '.join(known)}"
            f"{suggest(source, known)}"
        )
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as err:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(err).split())[:200]})") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: expected a mapping of {', '.join(Hardware.model_fields)}")
    try:
        return Hardware.model_validate({"name": path.stem, **fields})
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"]))
        hint = suggest(place, list(Hardware.model_fields)) if "extra" in first["type"] else ""
        raise UsageError(f"{path}: {place}: {first['msg']}{hint}") from None
