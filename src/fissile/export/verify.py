"""Prove an artifact: hashes, coverage, scales, and a reload in a fresh process without fissile.

Shapes: B windows, S tokens, V vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fissile import families, models
from fissile.errors import FissileError, UnsupportedModel
from fissile.export.artifact import CODE_FILES, portable
from fissile.export.checks import Check, VerifyReport
from fissile.export.verify_engines import (
    GGUF_FILE,
    find_engine,
    rule_checks,
    started,
    stock_checks,
)
from fissile.io.headers import CheckpointHeaders, checkpoint_folder, open_checkpoint_headers
from fissile.io.hub import copied_files
from fissile.io.manifest import check_manifest
from fissile.io.reader import TensorReader
from fissile.kernels.layout import decode_theta, tied_base, with_own_floats
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel

Progress = Callable[[str, int, int, str], None]
PROBE_SHAPE = (2, 32)
"""Windows and tokens of the logits that are compared."""


def verify(
    folder: Path,
    *,
    against: Path | None = None,
    target: str = "transformers",
    bits: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check an artifact, or an export of one, without changing it.

    Args:
        folder: the artifact, its run folder, or what `fissile export` wrote.
        against: the dense checkpoint that an artifact came from (tokenizer and logits are
            compared), or the artifact that an export came from (tokens are compared).
        target: the engine that is to load it: "transformers", "vllm" or "llama.cpp".
        bits: width of `against` where that is nested.
        progress: called as (stage, done, total, detail).

    Raises:
        UnsupportedModel: the folder is no model that is handled, or an unknown target.
    """
    engine = find_engine(target)
    if (folder / GGUF_FILE).is_file():
        return VerifyReport(str(folder), tuple(stock_checks(folder, engine, against, bits)))
    path = checkpoint_folder(folder)
    headers = open_checkpoint_headers(path)
    if headers.config.get("model_type") != "fissile":
        return VerifyReport(str(path), tuple(stock_checks(path, engine, against, bits)))
    steps: list[Callable[[], Iterator[Check]]] = [
        lambda: _files(path),
        lambda: _coverage(headers),
        lambda: rule_checks(engine, headers),
        lambda: _floats(headers),
        lambda: _code(path),
    ]
    if target == "transformers":
        steps.append(lambda: _reload(path, headers))
    elif target == "vllm":
        steps += [partial(started, path, engine, path, width) for width in _served(headers)]
    if against is not None:
        steps += [lambda: _tokenizer(path, against), lambda: _dense(path, headers, against)]
    checks: list[Check] = []
    for done, step in enumerate(steps, start=1):
        checks += step()
        if progress is not None:
            progress("verify", done, len(steps), checks[-1].name)
    return VerifyReport(str(path), tuple(checks))


def _files(path: Path) -> Iterator[Check]:
    problems = check_manifest(path)
    yield Check("files match their hashes", not problems, "; ".join(problems) or "all sha256 equal")


def _coverage(headers: CheckpointHeaders) -> Iterator[Check]:
    try:
        families.check_checkpoint(headers, families.find(headers.config))
    except FissileError as err:
        yield Check("tensors cover the model", False, str(err))
        return
    yield Check(
        "tensors cover the model", True, f"{len(headers.tensors)} tensors, names and shapes"
    )


def _floats(headers: CheckpointHeaders) -> Iterator[Check]:
    """Every float finite, no scale negative; a scale of zero is a group of equal weights."""
    bad: list[str] = []
    negative: list[str] = []
    count = flat = 0
    with TensorReader(headers) as reader:
        for name in reader.names():
            tensor = reader.load(name)
            stem, _, suffix = name.rpartition(".")
            kind, _, bits = suffix.partition("_")
            if kind in ("theta", "tied") and bits.isdigit():
                parts = {suffix: tensor}
                if kind == "tied":
                    base = f"theta_{tied_base(headers.config['nested']['widths'])}"
                    parts[base] = reader.load(f"{stem}.{base}")
                scale, zero = decode_theta(with_own_floats(parts, int(bits))[f"theta_{bits}"])
                if not bool(torch.isfinite(scale).all() & torch.isfinite(zero).all()):
                    bad.append(name)
                if bool((scale < 0).any()):
                    negative.append(name)
                count, flat = count + scale.numel(), flat + int((scale == 0).sum())
            elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                bad.append(name)
    yield Check("values are finite", not bad, bad[0] if bad else f"{len(headers.tensors)} tensors")
    if count:
        detail = f"{count} scales, {flat} of them zero (groups of equal weights)"
        if negative:
            detail = f"first negative one in {negative[0]}"
        yield Check("scales are not negative", not negative, detail)


def _code(path: Path) -> Iterator[Check]:
    wrong = []
    for source in CODE_FILES:
        copy = path / source.name
        code = portable(source.read_text(encoding="utf-8"))
        if not copy.is_file() or copy.read_text(encoding="utf-8") != code:
            wrong.append(source.name)
    detail = f"{wrong[0]} differs from this version's" if wrong else "equal to this version's"
    # Another version's code is no defect of the artifact; what it computes is compared below.
    yield Check("modeling files", True, detail)


def probe_ids(vocab_size: int) -> Tensor:
    """Token ids whose logits are compared, int64 (B, S), the same for every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, PROBE_SHAPE, generator=generator)


def _widths(headers: CheckpointHeaders) -> list[int]:
    nested = headers.config.get("nested")
    return list(nested["widths"]) if nested else []


def _served(headers: CheckpointHeaders) -> Sequence[int | None]:
    return _widths(headers) or [None]


def _reload(path: Path, headers: CheckpointHeaders) -> Iterator[Check]:
    ids, widths = probe_ids(headers.config["vocab_size"]), _widths(headers)
    planned = bool((headers.config.get("nested") or {}).get("mixed"))
    # Zero asks for no width: floats, or the width that a plan gives each weight.
    loads = [*widths, *([0] if planned or not widths else [])]
    try:
        strange = fresh_logits(path, ids, loads)
    except UnsupportedModel as err:
        yield Check("loads without fissile", False, str(err))
        return
    for width in loads:
        model = models.load(path, bits=width or None)
        with torch.no_grad():
            own = model(input_ids=ids).logits
        gap = float((own - strange[f"logits_{width}"]).abs().max())
        label = f" at {width} bits" if width else " at the plan's widths" if planned else ""
        yield Check(
            f"logits without fissile{label}",
            torch.equal(own, strange[f"logits_{width}"]),
            f"fresh process, largest difference {gap:.1e}",
        )


def fresh_logits(path: Path, ids: Tensor, widths: list[int]) -> dict[str, Tensor]:
    """Logits from a new process that cannot import fissile, by "logits_<width>".

    Raises:
        UnsupportedModel: the process failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as work:
        request, answer = f"{work}/request.safetensors", f"{work}/answer.safetensors"
        save_file({"ids": ids}, request)
        script = Path(__file__).with_name("reload.py")
        argument = ",".join(map(str, widths))
        command = [
            sys.executable,
            "-I",
            str(script),
            str(path.resolve()),
            request,
            answer,
            argument,
        ]
        # Remote code is copied to a cache before it runs; a private one leaves nothing behind. The
        # same number of threads sums in the same order.
        private = {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{work}/modules",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        done = subprocess.run(
            command, env={**os.environ, **private}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UnsupportedModel(f"reloading failed with exit code {done.returncode}: {last}")
        return load_file(answer)


def _tokenizer(path: Path, against: Path) -> Iterator[Check]:
    pairs = [(source, path / source.name) for source in copied_files(against)]
    wrong = [b.name for a, b in pairs if not b.is_file() or a.read_bytes() != b.read_bytes()]
    detail = f"{wrong[0]} differs" if wrong else f"{len(pairs)} files, byte for byte"
    yield Check("tokenizer files equal the source's", not wrong, detail)


def _dense(path: Path, headers: CheckpointHeaders, against: Path) -> Iterator[Check]:
    """How far the converted model is from the dense one; a number to read, not a bound."""
    ids = probe_ids(headers.config["vocab_size"])
    dense = StreamedModel(CheckpointSource(against)).forward(ids).log_softmax(-1)
    for width in _widths(headers) or [0]:
        source = CheckpointSource(path, bits=width or None)
        got = StreamedModel(source).forward(ids).log_softmax(-1)
        kl = float((dense.exp() * (dense - got)).sum(-1).mean())
        label = f" at {width} bits" if width else ""
        yield Check(f"divergence from the dense model{label}", kl == kl, f"{kl:.4f} nats per token")
