"""What a simulation of serving left in a file, checked when it is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fissile.errors import CorruptCheckpoint


class _Loose(BaseModel):
    """Fields that a later version adds are left out; those that are used must be there."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Percentiles(_Loose):
    """Seconds, or passes."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class ServingOutcome(_Loose):
    """One simulation; see `serve.outcome.Outcome`."""

    hit_rate: float
    late_rate: float
    unique_experts: float
    bytes_moved: float
    bytes_per_token: float
    wasted_share: float
    ttft: Percentiles
    tbt: Percentiles
    wait: Percentiles
    wait_passes: Percentiles
    stall_share: float
    cpu_share: float
    degraded_share: float
    passes: int
    tokens_per_second: float


class ServingRow(_Loose):
    """A system at a capacity."""

    name: str
    scheduler: str
    predictor: str
    cache: str
    executor: str
    per_layer: bool
    capacity: int
    share: float
    outcome: ServingOutcome


class ServingMachine(_Loose):
    """What it was simulated on."""

    name: str
    memory_bandwidth: float
    link_bandwidth: float


class ServingLimits(_Loose):
    """Of a pass."""

    tokens: int
    requests: int


class ServingModel(_Loose):
    """What was simulated."""

    name: str
    layers: int
    experts: int
    top_k: int
    total_bytes: int


class ServingTrace(_Loose):
    """Requests of the trace."""

    model: ServingModel
    requests: int
    prompt_tokens: int
    output_tokens: int
    decisions: int
    domains: list[str]
    source: dict[str, Any] = Field(default_factory=dict)


class Serving(_Loose):
    """Systems side by side; rows by system, then by capacity."""

    trace: ServingTrace
    hardware: ServingMachine
    limits: ServingLimits
    rows: list[ServingRow] = Field(min_length=1)

    def at(self, share: float) -> list[ServingRow]:
        """The rows of one capacity, in the order of the systems."""
        return [row for row in self.rows if row.share == share]

    @property
    def shares(self) -> list[float]:
        """Capacities, ascending."""
        return sorted({row.share for row in self.rows})

    @property
    def names(self) -> list[str]:
        """Systems, in their order."""
        return list(dict.fromkeys(row.name for row in self.rows))


def read_serving(path: Path) -> Serving:
    """Read a comparison that `fissile simulate` wrote.

    Raises:
        CorruptCheckpoint: not such a file.
    """
    try:
        return Serving.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise CorruptCheckpoint(f"{path}: {place}: {first['msg']}") from None
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{path}: cannot be read ({' '.join(str(err).split())})") from None
