"""Every exception to the algorithm as a row, with limits: starved experts, kept floats ..."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fissile.errors import CorruptCheckpoint, QualityGate
from fissile.io.publish import atomic_write_bytes


@dataclass(frozen=True)
class Event:
    """One exception.

    Attributes:
        kind: what happened, e.g. "starved_expert", "kept_float", "refit_rejected".
        stage: stage that reports it.
        layer: index of the layer, None when it concerns the whole model.
        module: tensor or module, relative to the layer.
        detail: one sentence for a person.
        value: the number behind it, if there is one.
    """

    kind: str
    stage: str
    layer: int | None
    module: str
    detail: str
    value: float | None = None


class Ledger:
    """Events of a run, in the order in which they happened."""

    def __init__(self, events: Iterable[Event] = ()) -> None:
        self.events = list(events)

    def add(self, event: Event) -> None:
        """Append one event."""
        self.events.append(event)

    def replace_stage(self, stage: str, events: Iterable[Event]) -> None:
        """Drop what an earlier attempt at `stage` reported and append `events`."""
        self.events = [e for e in self.events if e.stage != stage] + list(events)

    def counts(self) -> dict[str, int]:
        """Number of events by kind."""
        return dict(sorted(Counter(e.kind for e in self.events).items()))

    def enforce(self, limits: Mapping[str, int]) -> None:
        """Check the number of events of every kind against its limit.

        Raises:
            QualityGate: a limit is exceeded.
        """
        counts = self.counts()
        over = [
            f"{k}: {counts[k]} events, limit {n}" for k, n in limits.items() if counts.get(k, 0) > n
        ]
        if over:
            raise QualityGate(f"ledger over its limits ({'; '.join(over)})")

    def to_csv(self, path: Path) -> None:
        """Write all events; the header row is there even without any."""
        from io import StringIO

        text = StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(Event)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(event) for event in self.events)
        atomic_write_bytes(path, text.getvalue().encode())

    @classmethod
    def from_csv(cls, path: Path) -> Ledger:
        """Read what `to_csv` wrote; an absent file is an empty ledger.

        Raises:
            CorruptCheckpoint: the file is not a ledger.
        """
        if not path.exists():
            return cls()
        try:
            with path.open(newline="", encoding="utf-8") as file:
                return cls(_event(row) for row in csv.DictReader(file))
        except (KeyError, ValueError, TypeError) as err:
            raise CorruptCheckpoint(f"{path}: not a ledger ({type(err).__name__}: {err})") from None


def _event(row: Mapping[str, str]) -> Event:
    return Event(
        kind=row["kind"],
        stage=row["stage"],
        layer=int(row["layer"]) if row["layer"] else None,
        module=row["module"],
        detail=row["detail"],
        value=float(row["value"]) if row["value"] else None,
    )
