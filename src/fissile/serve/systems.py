"""Published systems and ours as combinations of policies, side by side on one trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fissile.errors import UsageError
from fissile.registry import suggest
from fissile.serve.batching import Limits
from fissile.serve.hardware import Hardware
from fissile.serve.outcome import Outcome
from fissile.serve.simulate import Setting, System, simulate
from fissile.serve.trace import Trace

Progress = Callable[[str, int, int, str], None]

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("on-demand"),
        System("layered", scheduler="layered"),
        System("mixed", executor="mixed"),
        System("hybrimoe", predictor="next-gate::3", cache="mrs", executor="hybrid"),
        System("expertflow", scheduler="expertflow", predictor="path:0.9", cache="plec"),
        System("prefetch", predictor="pregate:0", cache="lru"),
        System("fissile", scheduler="expert-aware", predictor="pregate:2", cache="belady"),
        System("oracle", scheduler="expert-aware", predictor="pregate:2", cache="oracle"),
    )
}
"""Named combinations, the simplest first. "fissile" is what `fissile generate` does; "oracle" is
its bound, which knows the whole schedule."""

LIMITS = Limits(tokens=64, requests=64, wait=32)
"""Of a pass, unless others are given."""


@dataclass(frozen=True)
class Row:
    """One simulation of a comparison.

    Args:
        system: the policies.
        capacity: bytes for experts.
        share: that, of the bytes of all experts.
        outcome: what was measured.
    """

    system: System
    capacity: int
    share: float
    outcome: Outcome


@dataclass(frozen=True)
class Comparison:
    """Systems by capacity.

    Args:
        trace: what was simulated.
        hardware: on what.
        limits: of a pass.
        pool: most requests under way.
        rows: systems in the order given, capacities ascending.
    """

    trace: Trace
    hardware: Hardware
    limits: Limits
    pool: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        trace = self.trace
        return {
            "trace": {
                "model": asdict(trace.model) | {"total_bytes": trace.model.total_bytes},
                "requests": trace.requests,
                "prompt_tokens": int(trace.prompt.sum()),
                "output_tokens": int(trace.output.sum()),
                "seconds": float(trace.arrival[-1]),
                "domains": list(trace.domains),
                "decisions": trace.decisions,
                "source": trace.source,
            },
            "hardware": self.hardware.model_dump(),
            "limits": asdict(self.limits) | {"pool": self.pool},
            "rows": [
                {
                    **asdict(row.system),
                    "capacity": row.capacity,
                    "share": row.share,
                    "outcome": row.outcome.to_dict(),
                }
                for row in self.rows
            ],
        }


def find_system(spec: str) -> System:
    """A system by name, or a new one.

    Args:
        spec: a name of `SYSTEMS`, or NAME=scheduler,predictor,cache,executor, where words at the
            end may be left out and "layer" as a fifth gives every layer a cache of its own.

    Raises:
        UsageError: no such system, or a policy that does not exist.
    """
    name, equals, words = spec.partition("=")
    if not equals:
        if name not in SYSTEMS:
            known = list(SYSTEMS)
            raise UsageError(
                f"unknown system {name!r}{suggest(name, known)} (known: {', '.join(known)}; a new"
                " one is NAME=scheduler,predictor,cache,executor)"
            )
        return SYSTEMS[name]
    parts = words.split(",")
    if not name or len(parts) > 5 or parts[4:] not in ([], ["layer"]):
        raise UsageError(
            f"system {spec!r}: expected NAME=scheduler,predictor,cache,executor[,layer]"
        )
    fields = dict(zip(("scheduler", "predictor", "cache", "executor"), parts, strict=False))
    system = System(name, **fields, per_layer=len(parts) > 4)
    system.check()
    return system


def compare_systems(
    trace: Trace,
    systems: Sequence[System],
    hardware: Hardware,
    *,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    limits: Limits = LIMITS,
    pool: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Simulate every system at every capacity.

    Args:
        trace: requests and routes.
        systems: to compare, names all different.
        hardware: speeds.
        shares: capacities as shares of the bytes of all experts, in (0, 1].
        limits: of a pass.
        pool: most requests under way.
        seed: of predictors' errors.
        progress: called as ("simulate", done, total, system).

    Raises:
        UsageError: nothing to compare, two systems of one name, or a share out of range.
    """
    if not systems or len({s.name for s in systems}) < len(systems):
        raise UsageError("give at least one system, and every one a name of its own")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise UsageError(f"capacities {', '.join(map(str, shares))}: shares above 0, at most 1")
    rows = []
    total = len(systems) * len(set(shares))
    for system in systems:
        for share in sorted(set(shares)):
            capacity = int(share * trace.model.total_bytes)
            setting = Setting(hardware, capacity, limits, pool, seed)
            rows.append(Row(system, capacity, share, simulate(trace, system, setting)))
            if progress is not None:
                progress("simulate", len(rows), total, system.name)
    return Comparison(trace, hardware, limits, pool, tuple(rows))


def prepared(
    trace: Trace,
    *,
    requests: int | None = None,
    rate: float | None = None,
    planes: int | None = None,
) -> Trace:
    """A trace as it is to be simulated.

    Args:
        trace: as read.
        requests: use the first so many.
        rate: requests per second; None: as recorded.
        planes: planes that experts are served with; None for all.

    Raises:
        UsageError: a number out of range.
    """
    if requests is not None:
        trace = trace.head(requests)
    if rate is not None:
        if not rate > 0:
            raise UsageError(f"rate {rate:g}: above 0")
        trace = trace.at_rate(rate)
    if planes is None:
        return trace
    try:
        return replace(trace, model=trace.model.served_with(planes))
    except ValueError as err:
        raise UsageError(str(err)) from None
