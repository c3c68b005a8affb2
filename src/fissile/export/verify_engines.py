"""Prove an export: hashes, an engine's rules, and the engine's own tokens against a reference.

Shapes: B prompts, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fissile.errors import UnsupportedModel
from fissile.export.checks import Check
from fissile.export.engine_run import Answer, available, greedy
from fissile.export.engines import ENGINES, Engine, engine_rules
from fissile.export.gguf_file import load_gguf
from fissile.export.weights import open_weights
from fissile.io.headers import CheckpointHeaders, open_checkpoint_headers
from fissile.io.manifest import MANIFEST_FILE, check_manifest
from fissile.io.reader import TensorReader
from fissile.models.stream import StreamedModel

GGUF_FILE = "model.gguf"
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 16, 24
MARGIN = 1e-3
"""Largest lead in logits that the reference's best token may have over the engine's."""
ROUNDED_MARGIN = 1.0
"""The same where an engine rounds activations to 8 bits to multiply them with codes."""


def find_engine(target: str) -> Engine:
    """The engine of that name.

    Raises:
        UnsupportedModel: there is none.
    """
    if target not in ENGINES:
        raise UnsupportedModel(f"target {target!r}: accepted are {', '.join(ENGINES)}")
    return ENGINES[target]


def rule_checks(engine: Engine, headers: CheckpointHeaders) -> Iterator[Check]:
    """What an engine demands of a folder, from headers alone."""
    for rule in engine_rules(engine, headers):
        yield Check(f"{engine.name} {engine.version}: {rule.name}", rule.ok, rule.detail)


def stock_checks(
    path: Path, engine: Engine, against: Path | None, bits: int | None
) -> Iterator[Check]:
    """Everything about a folder of a stock class, or with a GGUF file.

    Args:
        path: the folder.
        engine: what is to load it.
        against: the artifact that it was exported from; its logits judge the engine's tokens.
        bits: width of that artifact.
    """
    if (path / MANIFEST_FILE).is_file():
        wrong = check_manifest(path)
        yield Check("files match their hashes", not wrong, "; ".join(wrong) or "all sha256 equal")
    file = path / GGUF_FILE
    if not file.is_file():
        headers = open_checkpoint_headers(path)
        yield from rule_checks(engine, headers)
        yield from _finite(headers)
        if engine.name == "llama.cpp":
            return
    elif engine.name != "llama.cpp":
        yield Check("class", False, f"{GGUF_FILE} is read by llama.cpp, not by {engine.name}")
        return
    if against is not None and file.is_file():
        margin = ROUNDED_MARGIN if _has_codes(file) else MARGIN
        yield from started(file, engine, against, bits, margin)
    elif against is not None:
        yield from started(path, engine, against, bits, MARGIN)


def started(
    path: Path, engine: Engine, against: Path, bits: int | None, margin: float = MARGIN
) -> Iterator[Check]:
    """Start an engine, where it is installed, and compare what it generates with a reference.

    Args:
        path: what the engine loads.
        engine: which one.
        against: the artifact or checkpoint that the reference is.
        bits: width of `against`, and of `path` where that is the same artifact.
        margin: largest lead in logits of the reference's best token over the engine's.
    """
    at_width = f" at {bits} bits" if bits else ""
    reason = available(engine.name)
    if reason is not None:
        yield Check(f"{engine.name} generates{at_width}", True, f"not started: {reason}")
        return
    yield from _tokens(path, engine, against, bits, margin, at_width)


def _has_codes(file: Path) -> bool:
    """Whether a GGUF file keeps weights as integer codes."""
    reader = load_gguf().GGUFReader(file)
    return any(tensor.tensor_type.name == "Q4_1" for tensor in reader.tensors)


def _finite(headers: CheckpointHeaders) -> Iterator[Check]:
    bad = []
    with TensorReader(headers) as reader:
        for name in reader.names():
            tensor = reader.load(name)
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad.append(name)
    yield Check("values are finite", not bad, bad[0] if bad else f"{len(headers.tensors)} tensors")


def _tokens(
    path: Path, engine: Engine, against: Path, bits: int | None, margin: float, at_width: str
) -> Iterator[Check]:
    """Every token the engine chose is the reference's best, given the engine's own history."""
    model = StreamedModel(open_weights(against, bits).source)
    generator = torch.Generator().manual_seed(0)
    shape = (PROMPTS, PROMPT_TOKENS)
    prompts = torch.randint(0, model.config.vocab_size, shape, generator=generator)
    own = bits if path == against else None
    try:
        answer = greedy(engine.name, path, prompts.tolist(), NEW_TOKENS, bits=own)
    except UnsupportedModel as err:
        yield Check(f"{engine.name} generates{at_width}", False, str(err))
        return
    verdict = judge(model, prompts, answer)
    detail = (
        f"{verdict.equal} of {PROMPTS * NEW_TOKENS} tokens are the reference's,"
        f" lead {verdict.lead:.1e}"
    )
    name = f"{engine.name} generates the reference's tokens{at_width}"
    yield Check(name, verdict.lead <= margin, detail)
    if answer.logprobs is not None:
        detail = f"largest difference {verdict.logprob:.1e}"
        yield Check(
            f"{engine.name}'s log-probabilities{at_width}", verdict.logprob <= MARGIN, detail
        )


@dataclass(frozen=True)
class Verdict:
    """How far greedy answers are from a reference's choices.

    Attributes:
        lead: largest lead in logits of the reference's best token over the engine's.
        equal: tokens that are the reference's own.
        logprob: largest difference of log-probabilities; 0 where the engine tells none.
    """

    lead: float
    equal: int
    logprob: float = 0.0


def judge(model: StreamedModel, prompts_BS: Tensor, answer: Answer) -> Verdict:
    """Compare an engine's tokens with a reference that is given the engine's own history.

    Args:
        model: the reference.
        prompts_BS: int64.
        answer: of the engine, to the same prompts.
    """
    answers_BT = torch.tensor(answer.tokens)
    ids = torch.cat([prompts_BS, answers_BT], dim=1)
    first = prompts_BS.shape[1] - 1
    logits_BTV = model.forward(ids)[:, first:-1]
    best = logits_BTV.max(-1)
    chosen = logits_BTV.gather(-1, answers_BT[..., None])[..., 0]
    lead = float((best.values - chosen).max())
    equal = int((best.indices == answers_BT).sum())
    if answer.logprobs is None:
        return Verdict(lead, equal)
    own = chosen - logits_BTV.logsumexp(-1)
    return Verdict(lead, equal, float((own - torch.tensor(answer.logprobs)).abs().max()))
