"""A converted demo model, and requests of real text of several domains for what serves it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor

from fissile.cli.main import main
from fissile.serve.batching import Limits, make_scheduler
from fissile.serve.engine import Engine
from fissile.serve.generate import serving
from fissile.serve.options import ServeOptions
from fissile.serve.requests import PassRecord, Request
from fissile.serve.store import StoreStats

SETTINGS = [
    "calibrate.tokens=2048",
    "calibrate.context=256",
    "calibrate.batch_tokens=2048",
    "extract.allocation=uniform",
    "extract.refine_rounds=0",
    "route.steps=20",
    "route.batch_tokens=1024",
    "recover.refit=false",
    "recover.method=none",
    "quantize.attention=false",
    "quantize.tokens=512",
    "limits.max_ppl_ratio=null",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of calibration.jsonl and heldout.jsonl, text of this installation by domain."""
    from fissile.eval.corpus import build_corpus

    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def served(demo_model: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as 12 experts a layer, 4 for a token, at 2, 3 and 4 bits; read-only."""
    out = tmp_path_factory.mktemp("served") / "run"
    words = ["run", "demo/moe-nested", "-q", "--model", str(demo_model), "--out", str(out)]
    settings = [*SETTINGS, f"calibrate.data={corpus / 'calibration.jsonl'}"]
    words += [part for item in settings for part in ("--set", item)]
    assert main([*words, "--stop-after", "export"]) == 0
    return out / "model"


@dataclass
class Work:
    """Requests, and the tokens with which their texts go on."""

    requests: list[Request]
    truth: list[list[int]]

    def follow(self) -> Callable[[int, Tensor], int]:
        """Make the model read the texts rather than repeat itself, as small models do."""
        at = [0] * len(self.truth)

        def pick(ident: int, logits_V: Tensor) -> int:
            at[ident] += 1
            return self.truth[ident][at[ident] - 1]

        return pick


@pytest.fixture(scope="session")
def mixed(served: Path, corpus: Path) -> Callable[..., Work]:
    """Requests whose texts take turns over the domains."""
    from fissile.eval.tokens import encode, load_tokenizer

    texts: dict[str, list[str]] = {}
    for line in (corpus / "heldout.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["domain"], []).append(row["text"])
    tokenizer = load_tokenizer(served)
    ids = {name: encode(tokenizer, own) for name, own in texts.items()}
    names = sorted(ids)

    def make(
        count: int, prompt: tuple[int, int], output: tuple[int, int], gap: float = 0.0
    ) -> Work:
        rng, work, arrival = random.Random(0), Work([], []), 0.0
        for i in range(count):
            before, after = rng.randint(*prompt), rng.randint(*output)
            own = ids[names[i % len(names)]]
            text = rng.choice([text for text in own if len(text) >= before + after])
            begin = rng.randint(0, len(text) - before - after)
            part = text[begin : begin + before + after]
            work.requests.append(Request(i, (0, *part[:before]), after, arrival=int(arrival)))
            work.truth.append(part[before:])
            arrival += rng.expovariate(1 / gap) if gap else 0.0
        return work

    return make


@dataclass
class Outcome:
    """What a run of the engine left."""

    tokens: dict[int, list[int]]
    stats: StoreStats
    passes: list[PassRecord]
    waited: list[int]
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def unique(self) -> float:
        """Different experts a layer and pass, mean over the passes."""
        return sum(p.unique_experts for p in self.passes) / len(self.passes)


@pytest.fixture(scope="session")
def play() -> Callable[..., Outcome]:
    """Run requests on an artifact."""

    def run(
        folder: Path,
        requests: Sequence[Request],
        options: ServeOptions,
        pick: Callable[[int, Tensor], int] | None = None,
    ) -> Outcome:
        passes: list[PassRecord] = []
        tokens: dict[int, list[int]] = {request.ident: [] for request in requests}
        limits = Limits(options.batch_tokens, options.batch_requests, options.max_wait)
        with serving(folder, options) as (model, store):
            engine = Engine(
                model,
                store,
                make_scheduler(options.scheduler),
                limits,
                horizon=options.horizon,
                record=passes.append,
                pick=pick,
            )
            for token in engine.run(requests):
                if token.token is not None:
                    tokens[token.request].append(token.token)
            stats = store.stats()
        return Outcome(tokens, stats, passes, sorted(engine.waited.values()))

    return run


@pytest.fixture(scope="session")
def prompt(mixed: Callable[..., Work]) -> tuple[int, ...]:
    """The beginning of a text."""
    return tuple(mixed(1, (40, 40), (1, 1)).requests[0].prompt)
