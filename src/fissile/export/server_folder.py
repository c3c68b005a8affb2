"""Write a dense model's integers as a folder that servers load; checked before any weight is read.

Shapes: N windows, S tokens, O output rows, I inputs, G groups.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fissile.errors import UnsupportedModel
from fissile.eval.corpus import build_corpus
from fissile.eval.documents import read_documents
from fissile.eval.tokens import load_tokenizer
from fissile.eval.windows import sample_windows
from fissile.export.classes import FFNS
from fissile.export.dense import lower_dense
from fissile.export.pieces import Lowered, materialise
from fissile.export.servers import (
    FORMATS,
    compressed_tensors,
    gptq_tensors,
    quantization_config,
    quantize_for_server,
)
from fissile.export.stock import SHARD_BYTES, finish_folder
from fissile.export.weights import Weights, open_weights
from fissile.io.hub import describe_source
from fissile.io.manifest import Origin
from fissile.io.publish import published
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter
from fissile.models.stream import StreamedModel
from fissile.quant.integer_zeros import IntegerWeight

Progress = Callable[[str, int, int, str], None]
CONTEXT, BATCH_TOKENS = 2048, 8192


@dataclass(frozen=True)
class ServerExport:
    """A dense model that fits a format.

    Attributes:
        method: word for the format.
        weights: what is read.
        lowered: the model with float weights, as its plain class.
        bits: width of the codes.
        group_size: inputs that share a scale.
    """

    method: str
    weights: Weights
    lowered: Lowered
    bits: int
    group_size: int

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the plan."""
        linears = [t for t in self.lowered.targets if _is_linear(t.name)]
        coded = sum(t.shape[0] * t.shape[1] for t in linears)
        groups = coded // self.group_size
        floats = 16 if FORMATS[self.method].symmetric else 16 + self.bits
        return {
            "target": self.method,
            **self.lowered.cost,
            "weights_exact": False,
            "bits": self.bits,
            "group_size": self.group_size,
            "bits_per_weight": round(self.bits + floats * groups / coded, 3),
        }


def prepare_server(source: Path, method: str, *, bits: int | None, group_size: int) -> ServerExport:
    """Check a model against a format, from config.json and headers.

    Raises:
        UnsupportedModel: reasons and alternatives.
    """
    wanted = FORMATS[method]
    chosen = wanted.bits[0] if bits is None else bits
    weights = open_weights(source)
    family, config = weights.source.family, weights.source.headers.config
    reasons = []
    if chosen not in wanted.bits:
        accepted = ", ".join(map(str, wanted.bits))
        reasons.append(
            f"{method}: {chosen} bits have no kernel in the servers that read it, accepted: "
            f"{accepted}; fewer bits are served by the artifact itself"
        )
    if config.get("nested") is not None:
        reasons.append(f"{method}: the weights are quantized already; start from the float model")
    if config.get("routing") is not None:
        reasons.append(
            f"{method}: dense models only, experts have no kernel everywhere; a pruned model is "
            "first exported with --to dense"
        )
    if family.fused_gate_up or family.model_types[0] not in FFNS:
        reasons.append(f"{method}: written for {', '.join(FFNS)}, not for {family.name}")
    if reasons:
        raise UnsupportedModel("; ".join(reasons))
    lowered = lower_dense(family, config, constants=False)
    reasons = list(_shape_problems(method, lowered, chosen, group_size))
    if reasons:
        raise UnsupportedModel(reasons[0])
    return ServerExport(method, weights, lowered, chosen, group_size)


def _shape_problems(method: str, lowered: Lowered, bits: int, group: int) -> Iterator[str]:
    for target in lowered.targets:
        if not _is_linear(target.name):
            continue
        rows, inputs = target.shape
        if inputs % group:
            yield (
                f"{method}: group size {group} does not divide the {inputs} inputs of {target.name}"
            )
        if rows % (32 // bits):
            yield f"{method}: {rows} rows of {target.name} do not fill 32-bit words of {bits} bits"


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") and name.startswith("model.layers.")


def write_server(
    export: ServerExport,
    out: Path,
    *,
    data: Path | None,
    tokens: int,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize and write.

    Args:
        export: from `prepare_server`.
        out: folder.
        data: calibration text; this installation's own without it.
        tokens: calibration tokens.
        seed: of the sampling.
        overwrite: replace an existing folder.
        progress: called as (stage, done, total, detail).

    Returns:
        Folder, bytes, plan and losses.
    """
    source = export.weights.source
    ids_NS = calibration_ids(export.weights, data, tokens, seed)
    plan = list(_plan(export))
    origin = Origin(source=describe_source(source.headers), seed=seed)
    losses: list[dict[str, float]] = []
    with published(out, overwrite=overwrite) as folder:
        with ShardWriter(folder, plan, SHARD_BYTES) as writer:
            for name, tensor in _written(export, ids_NS, losses, progress):
                writer.write(name, tensor)
        loss = _summary(losses)
        quantization = quantization_config(export.method, export.bits, export.group_size)
        config = export.lowered.config | {
            "dtype": "bfloat16",
            "quantization_config": quantization,
        }
        cost = export.to_dict() | loss
        manifest = finish_folder(folder, config, cost, source.folder, origin)
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return {"out": str(out), "bytes": sum(sizes), **cost}


def calibration_ids(weights: Weights, data: Path | None, tokens: int, seed: int) -> Tensor:
    """Calibration windows, int64 (N, S)."""
    context = min(CONTEXT, weights.config.max_position_embeddings)
    with tempfile.TemporaryDirectory() as work:
        path = data
        if path is None:
            build_corpus(Path(work))
            path = Path(work) / "calibration.jsonl"
        tokenizer = load_tokenizer(weights.source.folder)
        documents = read_documents(path)
        ids, _, _ = sample_windows(
            documents, tokenizer, tokens, context, seed, config=weights.config
        )
    return ids.to(torch.int64)


def _plan(export: ServerExport) -> Iterator[PlannedTensor]:
    for target in export.lowered.targets:
        if not _is_linear(target.name):
            yield PlannedTensor(target.name, "BF16", target.shape)
            continue
        stem = target.name.removesuffix(".weight")
        for name, tensor in _pack(export.method, stem, _blank(export, target.shape)).items():
            yield PlannedTensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def _blank(export: ServerExport, shape: tuple[int, ...]) -> IntegerWeight:
    """A weight of zeros of the right shapes; the layout follows from packing it."""
    rows, inputs = shape
    groups = inputs // export.group_size
    zero = torch.ones(rows, groups, dtype=torch.uint8)
    codes = torch.zeros(rows, inputs, dtype=torch.uint8)
    scale = torch.ones(rows, groups)
    loss = torch.zeros(rows)
    return IntegerWeight(codes, scale, zero, export.bits, export.group_size, loss)


def _pack(method: str, name: str, weight: IntegerWeight) -> dict[str, Tensor]:
    pack = gptq_tensors if method == "gptq" else compressed_tensors
    return pack(name, weight)


def _written(
    export: ServerExport,
    ids_NS: Tensor,
    losses: list[dict[str, float]],
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    """Tensors in the order of the plan; layers are quantized when their turn comes."""
    layers = quantize_for_server(
        StreamedModel(export.weights.source),
        ids_NS,
        FORMATS[export.method],
        bits=export.bits,
        group_size=export.group_size,
        batch_tokens=BATCH_TOKENS,
        progress=progress,
    )
    current = -1
    for target in export.lowered.targets:
        if not _is_linear(target.name):
            yield target.name, materialise(target, export.weights.fetch).to(torch.bfloat16)
            continue
        index = int(target.name.split(".")[2])
        if index != current:
            weights, loss = next(layers)
            losses.append(loss)
            current = index
        name = target.name.removesuffix(".weight")
        yield from _pack(export.method, name, weights[name.rpartition(".")[2]]).items()


def _summary(losses: list[dict[str, float]]) -> dict[str, Any]:
    values = [(value, f"layer {i} {n}") for i, row in enumerate(losses) for n, value in row.items()]
    worst, where = max(values)
    return {
        "relative_loss_mean": sum(value for value, _ in values) / len(values),
        "relative_loss_largest": worst,
        "relative_loss_largest_in": where,
    }
