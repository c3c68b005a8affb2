"""What every stage of a run shares: recipe, source, folders, progress and the wish to stop."""

from __future__ import annotations

import fcntl
import logging
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fissile.config import Recipe
from fissile.errors import Interrupted, UsageError
from fissile.run.journal import Journal
from fissile.run.ledger import Ledger

if TYPE_CHECKING:
    from fissile.models.source import CheckpointSource
    from fissile.refactor.calibrate import Windows
    from fissile.workers import Workers

Progress = Callable[[str, int, int, str], None]
log = logging.getLogger("fissile")


@dataclass
class RunContext:
    """One run while it is going on.

    Attributes:
        recipe: resolved recipe.
        source: the dense checkpoint.
        out: the run folder.
        journal: what is already done.
        ledger: exceptions so far.
        progress: where progress is shown.
        workers: processes that train together; this one alone without `accelerate launch`.
        stop: set by a signal; `tick` turns it into `Interrupted` at the next unit boundary.
    """

    recipe: Recipe
    source: CheckpointSource
    out: Path
    journal: Journal
    ledger: Ledger
    progress: Progress
    workers: Workers
    stop: threading.Event = field(default_factory=threading.Event)

    def tick(self, stage: str, done: int, total: int, detail: str) -> None:
        """Report one finished unit.

        Raises:
            Interrupted: a signal asked the run to stop.
        """
        log.info("%s %d/%d %s", stage, done, total, detail)
        self.progress(stage, done, total, detail)
        if self.stop.is_set():
            raise Interrupted(f"stopped in {stage} at {done}/{total}; continue with --resume")

    def stage(
        self, name: str, work: Callable[[], dict[str, Any]], *, keep: bool = True
    ) -> dict[str, Any]:
        """Run a stage unless it is finished; return its record either way.

        Args:
            name: of the stage.
            work: does it, and returns what the report needs.
            keep: record that it is finished; False for work that is redone every time.
        """
        done = self.journal.finished(name)
        if done is not None:
            return done
        started = time.monotonic()
        log.info("%s begins", name)
        record = dict(work())
        record["peak_rss_bytes"] = peak_rss_bytes()
        self.ledger.to_csv(self.out / "ledger.csv")
        if keep:
            return self.journal.finish(name, started, record)
        return {"seconds": round(time.monotonic() - started, 2), **record}

    def calibration(self) -> Windows:
        """Calibration windows, sampled once and kept."""
        import torch

        from fissile.eval.documents import read_documents
        from fissile.eval.tokens import load_tokenizer
        from fissile.eval.windows import sample_windows
        from fissile.refactor.calibrate import Windows

        store, wanted = self.journal.store("calibrate"), self.recipe.calibrate
        if not store.has("windows"):
            path = self.data("calibration.jsonl", wanted.data)
            ids, domain, names = sample_windows(
                read_documents(path),
                load_tokenizer(self.source.folder),
                wanted.tokens,
                min(wanted.context, self.source.config.max_position_embeddings),
                self.recipe.seed,
                config=self.source.config,
            )
            store.save("windows", {"ids": ids, "domain": domain}, {"domains": names})
        tensors, record = store.load("windows")
        return Windows(tensors["ids"].to(torch.int64), tensors["domain"], tuple(record["domains"]))

    def data(self, name: str, given: str | None) -> Path:
        """A text file of the recipe, or its namesake built from this installation's own text."""
        if given is not None:
            return Path(given)
        folder = self.journal.corpus()
        if not (folder / name).exists():
            from fissile.eval.corpus import build_corpus

            build_corpus(folder)
        return folder / name


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM ask for a stop at the next unit; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep a second process out of a run folder; the lock dies with the process.

    Raises:
        UsageError: another process holds it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f".{out.name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{out}: another process is working on it") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def logged(out: Path) -> Iterator[None]:
    """Append the package's log to run.log while the context is open."""
    handler = logging.FileHandler(out / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        handler.close()
