"""What a simulation measured, as numbers that can be set side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass
class Tally:
    """Counts that grow while a simulation runs.

    Args:
        references: experts (planes) that passes needed; hits: of these, in memory when they were
            needed; late: of the others, on their way.
        bytes_needed: of the references; bytes_hit: of the hits.
        bytes_moved: over the link; bytes_wasted: of these, prefetched and dropped without use.
        on_cpu: references computed beside the link.
        choices: tokens times chosen experts; degraded: of these, at fewer planes.
        stall: seconds that the fast device waited for experts.
        unique: per pass, different experts of a layer, mean over its layers.
        rows: per pass and layer, tokens; summed.
    """

    references: int = 0
    hits: int = 0
    late: int = 0
    bytes_needed: float = 0.0
    bytes_hit: float = 0.0
    bytes_moved: float = 0.0
    bytes_wasted: float = 0.0
    on_cpu: int = 0
    choices: int = 0
    degraded: int = 0
    stall: float = 0.0
    unique: list[float] = field(default_factory=list)
    rows: int = 0


@dataclass
class Journey:
    """Times of one request.

    Args:
        arrival: seconds.
        times: when each of its tokens was there.
        wait: longest time between being ready and a pass; wait_passes: in passes.
    """

    arrival: float
    times: list[float] = field(default_factory=list)
    wait: float = 0.0
    wait_passes: int = 0


@dataclass(frozen=True)
class Spread:
    """Mean and percentiles; all 0 of nothing."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some values."""
        if not len(values):
            return cls(0.0, 0.0, 0.0, 0.0, 0.0)
        p50, p95, p99 = (float(v) for v in np.percentile(values, [50, 95, 99]))
        return cls(float(np.mean(values)), p50, p95, p99, float(np.max(values)))


@dataclass(frozen=True)
class Outcome:
    """The result of one simulation; times in seconds.

    Args:
        hit_rate: share of the references that were in memory when they were needed.
        byte_hit_rate: the same by bytes.
        late_rate: share of the references that were on their way.
        unique_experts: different experts of a layer that a pass needs, mean.
        bytes_moved: over the link.
        bytes_per_token: that, per generated token.
        wasted_share: of these bytes, prefetched and dropped without use.
        ttft: arrival to first token. tbt: between tokens. latency: arrival to the last token, per
            generated token.
        wait: longest wait of each request. wait_passes: in passes.
        stall_share: of the time, waiting for experts.
        cpu_share: of the references, computed beside the link.
        degraded_share: of tokens times experts, computed at fewer planes.
        passes, seconds, tokens: how many, in how long, generated.
    """

    hit_rate: float
    byte_hit_rate: float
    late_rate: float
    unique_experts: float
    bytes_moved: float
    bytes_per_token: float
    wasted_share: float
    ttft: Spread
    tbt: Spread
    latency: Spread
    wait: Spread
    wait_passes: Spread
    stall_share: float
    cpu_share: float
    degraded_share: float
    passes: int
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


def summarise(tally: Tally, journeys: Sequence[Journey], seconds: float) -> Outcome:
    """From counts to an outcome.

    Args:
        tally: of the whole run.
        journeys: of every request, finished.
        seconds: that passed while requests were there.
    """
    tokens = sum(len(j.times) for j in journeys)
    gaps = [np.diff(j.times) for j in journeys if len(j.times) > 1]

    def share(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    return Outcome(
        hit_rate=share(tally.hits, tally.references),
        byte_hit_rate=share(tally.bytes_hit, tally.bytes_needed),
        late_rate=share(tally.late, tally.references),
        unique_experts=float(np.mean(tally.unique)) if tally.unique else 0.0,
        bytes_moved=tally.bytes_moved,
        bytes_per_token=share(tally.bytes_moved, tokens),
        wasted_share=share(tally.bytes_wasted, tally.bytes_moved),
        ttft=Spread.of([j.times[0] - j.arrival for j in journeys]),
        tbt=Spread.of(np.concatenate(gaps).tolist() if gaps else []),
        latency=Spread.of([(j.times[-1] - j.arrival) / len(j.times) for j in journeys]),
        wait=Spread.of([j.wait for j in journeys]),
        wait_passes=Spread.of([j.wait_passes for j in journeys]),
        stall_share=share(tally.stall, seconds),
        cpu_share=share(tally.on_cpu, tally.references),
        degraded_share=share(tally.degraded, tally.choices),
        passes=len(tally.unique),
        seconds=seconds,
        tokens=tokens,
    )
