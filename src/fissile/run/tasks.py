"""One integer tensor, many tasks: floats of an artifact trained on labelled text.

What a task owns is a small file: scales, zeros and norms. Put into the artifact, they give another
one with the same integers (decoupleQ's last stage, arXiv 2404.12759).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fissile.config import Tune
from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.documents import read_documents
from fissile.eval.tokens import load_tokenizer
from fissile.eval.windows import sample_windows
from fissile.export.artifact import write_artifact
from fissile.families.artifact import float_shapes
from fissile.io.headers import checkpoint_folder
from fissile.io.hub import describe_source
from fissile.io.manifest import Origin, read_manifest
from fissile.io.publish import atomic_write_bytes
from fissile.kernels.layout import loaded_bytes
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.source import LAYER, CheckpointSource
from fissile.models.stream import StreamedModel
from fissile.quant.allocate import budget_bytes
from fissile.quant.layers import QuantizedLayer
from fissile.quant.once import Mix, check_budget, search
from fissile.quant.tune import TunedModel
from fissile.refactor.recover import Lesson
from fissile.refactor.training import Progress
from fissile.run.card import model_card
from fissile.run.tuning import float_lessons, moving_widths, train_floats, tuned_model

_SHARD_BYTES = 5_000_000_000


def tune_task(
    folder: Path,
    data: Path,
    out: Path,
    *,
    settings: Tune,
    tokens: int,
    seed: int,
    progress: Progress,
    budget: str | None = None,
    mixes: tuple[int, int] = (100, 50),
) -> dict[str, Any]:
    """Train scales, zeros and norms of an artifact on text; integers stay.

    Args:
        folder: the artifact, or a run folder with one.
        data: JSONL of documents; every eighth window only judges.
        out: file of the floats.
        settings: steps, rate, batch; the loss is next-token cross-entropy.
        tokens: of the text that are used.
        seed: of the sampling and of the order.
        progress: called as (stage, done, total, detail).
        budget: search a width for every weight as well: bits per weight (2.6bpw) or bytes (4GiB).
        mixes: random mixes of widths that are scored, and mixes within the budget.

    Returns:
        File, bytes, and the loss of the windows that judge, by width, before and after; with a
        budget that of the mix found too.

    Raises:
        UsageError: no artifact with nested weights, or one whose floats are tied, too little text,
            or a budget that is below the narrowest widths.
    """
    source = _trainable(folder)
    sizes, weights = _sizes(source)
    limit = None if budget is None else budget_bytes(budget, weights)
    layers = [_layer(source, i) for i in range(source.config.num_base_layers)]
    stored = layers[0].widths
    if not (widths := moving_widths(stored)):
        raise UsageError(f"{folder}: widths {list(stored)} have no floats that may move")
    ids_NS = _windows(source, data, tokens, settings.context, seed)
    norms = settings.norms and widths == stored
    if limit is not None:
        check_budget({name: {k: own[k] for k in widths} for name, own in sizes.items()}, limit)
    tuned = tuned_model(StreamedModel(source), layers, widths, settings, norms, seed)
    taught = float_lessons(settings, ids_NS, seed, None)
    # Every width counts the same: a task has no loss that falls with the width.
    omega = {bits: 4.0**-bits for bits in widths}
    record = train_floats(
        tuned, taught, omega, settings, checkpoint=None, progress=progress, seed=seed
    )
    metadata = {"base": _identity(source.folder)}
    if limit is not None:
        mix, mixed = _mix(tuned, taught[1], sizes, widths, limit, mixes, seed)
        record["mix"] = {"bytes": mix.bytes, "bits": 8 * mix.bytes / weights, "loss": mix.loss}
        metadata["mixed"] = json.dumps(mixed, sort_keys=True)
    metadata["record"] = json.dumps(record, sort_keys=True)
    atomic_write_bytes(out, save(_floats(tuned), metadata=metadata))
    return {"out": str(out), "bytes": out.stat().st_size, **record}


def _floats(tuned: TunedModel) -> dict[str, Tensor]:
    return {
        f"{LAYER}{i}.{name}": tensor.contiguous()
        for i, changed in enumerate(tuned.finish())
        for name, tensor in changed.items()
    }


def _windows(source: CheckpointSource, data: Path, tokens: int, context: int, seed: int) -> Tensor:
    """Windows of the task's text, int64."""
    ids_NS, _, _ = sample_windows(
        read_documents(data),
        load_tokenizer(source.folder),
        tokens,
        min(context, source.config.max_position_embeddings),
        seed,
        config=source.config,
    )
    return ids_NS.to(torch.int64)


def _mix(
    tuned: TunedModel,
    judge: Lesson,
    sizes: Mapping[str, Mapping[int, int]],
    widths: tuple[int, ...],
    limit: int,
    mixes: tuple[int, int],
    seed: int,
) -> tuple[Mix, dict[str, int]]:
    """The best mix within a budget on the windows that judge, and the width of every weight."""
    groups = tuned.shared_inputs()
    own = {
        key: {k: sum(sizes[name][k] for name in names) for k in widths}
        for key, names in groups.items()
    }

    def every(bits: Mapping[str, int]) -> dict[str, int]:
        return {name: bits[key] for key, names in groups.items() for name in names}

    def score(bits: Mapping[str, int]) -> float:
        return judge.judge(tuned.at(every(bits), stored=True))

    mix = search(score, own, limit, samples=mixes[0], finalists=mixes[1], seed=seed)
    return mix, every(mix.bits)


def with_floats(folder: Path, floats: Path, out: Path, *, overwrite: bool) -> dict[str, Any]:
    """Write an artifact anew with a task's floats.

    Args:
        folder: the artifact that the floats were trained on.
        floats: file that `tune_task` wrote.
        out: folder of the new artifact.
        overwrite: replace it.

    Returns:
        Folder and bytes.

    Raises:
        UsageError: the floats belong to another artifact.
        CorruptCheckpoint: the file cannot be read.
    """
    source = _artifact(folder)
    changed, mixed = _read_floats(floats, source.folder)
    config = FissileConfig.from_dict(source.headers.config)
    if mixed is not None:
        config.nested, config.bits = {**(config.nested or {}), "mixed": mixed}, None

    def provide(name: str) -> Tensor:
        return changed[name] if name in changed else source.stored(name)

    manifest = write_artifact(
        out,
        config,
        source.family,
        provide,
        source=source.folder,
        dtype=str(source.headers.config["dtype"]),
        max_shard_bytes=_SHARD_BYTES,
        origin=Origin(describe_source(source.headers)),
        card=model_card,
        overwrite=overwrite,
    )
    return {"out": str(out), "bytes": sum(e["bytes"] for e in manifest["files"].values())}


def _artifact(folder: Path) -> CheckpointSource:
    source = CheckpointSource(checkpoint_folder(folder))
    if source.nested is None:
        raise UsageError(f"{folder}: no artifact with bit-nested weights; see fissile quantize")
    return source


def _trainable(folder: Path) -> CheckpointSource:
    source = _artifact(folder)
    if source.nested is not None and source.nested.get("tied"):
        raise UsageError(
            f"{folder}: its narrower widths' floats are tied to the widest's: fitted, not trained;"
            " quantize with quantize.tied=false"
        )
    return source


def _layer(source: CheckpointSource, layer_idx: int) -> QuantizedLayer:
    """A layer of an artifact as the quantizer left it."""
    assert source.nested is not None
    prefix, nested, layer = f"{LAYER}{layer_idx}.", source.nested, QuantizedLayer()
    for full in nested["modules"]:
        if not full.startswith(prefix):
            continue
        name = full.removeprefix(prefix)
        layer.groups[name] = nested["groups"].get(full, nested["group_size"])
        layer.companding[name] = nested.get("companding", {}).get(full, 1.0)
        layer.parts |= {f"{name}.{k}": part for k, part in source.parts(full).items()}
    state = source.layer_state(layer_idx)
    layer.kept = {name: x for name, x in state.items() if name not in layer.groups}
    return layer


def _identity(folder: Path) -> str:
    """Hash of the weight files, as the manifest lists them."""
    files = read_manifest(folder)["files"]
    weights = {n: e["sha256"] for n, e in files.items() if n.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def _sizes(source: CheckpointSource) -> tuple[dict[str, dict[int, int]], int]:
    """Weight to width to bytes in memory, floats included; and how many weights there are."""
    assert source.nested is not None
    nested, found, weights = source.nested, {}, 0
    modules = set(nested["modules"])
    for name, shape in float_shapes(source.family, source.headers.config):
        if name in modules:
            group = nested["groups"].get(name, nested["group_size"])
            found[name] = {k: loaded_bytes(shape, group, k) for k in nested["widths"]}
            weights += prod(shape)
    return found, weights


def _read_floats(path: Path, folder: Path) -> tuple[dict[str, Tensor], dict[str, int] | None]:
    """Tensors of the file, and the width of every weight where one was searched."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            base = metadata.get("base")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as err:
        raise CorruptCheckpoint(f"{path}: {err}") from None
    if base != _identity(folder):
        raise UsageError(f"{path}: these floats were trained on another artifact than {folder}")
    return tensors, json.loads(metadata["mixed"]) if "mixed" in metadata else None
