"""One function for every export: check against the target's rules, then write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fissile.errors import UnsupportedModel, UsageError
from fissile.export.dense import dense_problems, lower_dense
from fissile.export.gguf_names import gguf_problems
from fissile.export.hosts import HOSTS, Host
from fissile.export.lowering import Measured, choose_host, lower
from fissile.export.pieces import Lowered
from fissile.export.targets import FLOATS, STOCK
from fissile.export.weights import Weights, has_constants, measure, open_weights
from fissile.io.hub import describe_source
from fissile.io.manifest import Origin


@dataclass(frozen=True)
class Prepared:
    """An export that passed its checks; nothing is written yet.

    Attributes:
        target: word for it.
        weights: what is read.
        lowered: what is written.
    """

    target: str
    weights: Weights
    lowered: Lowered

    def to_dict(self) -> dict[str, Any]:
        """JSON form of the plan."""
        return {"target": self.target, **self.lowered.cost}


def prepare(
    source: Path, target: str, *, bits: int | None = None, via: str | None = None
) -> Prepared:
    """Check a model against the rules of a target, and say what the export costs.

    Reads config.json, headers and small tensors only.

    Args:
        source: an artifact, a run folder, or a dense checkpoint.
        target: "mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe", "dense" or "gguf".
        bits: width at which nested weights are decoded; default the widest.
        via: the stock class behind a GGUF file; default the first that holds the model.

    Raises:
        UnsupportedModel: it cannot be expressed exactly; the reasons and alternatives.
        UsageError: an unknown target.
    """
    if target not in (*STOCK, "gguf"):
        raise UsageError(f"target {target!r}: accepted are {', '.join((*STOCK, 'gguf'))}")
    weights = open_weights(source, bits)
    name = via if target == "gguf" else target
    lowered = _lowered(weights, name)
    if target == "gguf" and (reasons := list(gguf_problems(lowered.config))):
        raise UnsupportedModel("; ".join(reasons))
    return Prepared(target, weights, lowered)


def _lowered(weights: Weights, name: str | None) -> Lowered:
    """The stock form; without a name the first class that llama.cpp reads too."""
    family, config = weights.source.family, weights.source.headers.config
    routing = config.get("routing")
    if name == "dense" or (name is None and (routing is None or routing["kind"] == "static")):
        constants = has_constants(weights)
        if reasons := list(dense_problems(family, config, constants)):
            raise UnsupportedModel("; ".join(reasons))
        return lower_dense(family, config, constants)
    known = Measured().known if routing is None else measure(weights).known
    host = choose_host(name, family, config, known, HOSTS if name else _readable())
    return lower(host, family, config, measure(weights, host))


def _readable() -> Mapping[str, Host]:
    return {name: host for name, host in HOSTS.items() if host.gguf}


def export(
    prepared: Prepared,
    out: Path,
    *,
    dtype: str = "float32",
    codes: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a prepared export; it appears complete, or not at all.

    Args:
        prepared: from `prepare`.
        out: folder.
        dtype: of float tensors, "float32" or "bfloat16".
        codes: GGUF only: keep integer codes as Q4_1 where they fit bit for bit.
        overwrite: replace an existing folder.

    Returns:
        Folder, bytes and cost.

    Raises:
        UsageError: the folder exists, or options that do not fit the target.
        UnsupportedModel: a dtype that is too narrow.
    """
    from fissile.export.gguf_file import load_gguf
    from fissile.export.stock import write_gguf_folder, write_stock

    if dtype not in FLOATS:
        raise UnsupportedModel(
            f"dtype {dtype}: accepted are {', '.join(FLOATS)}; float16 is too narrow for a router "
            "that became a layer"
        )
    weights, lowered = prepared.weights, prepared.lowered
    origin = Origin(source=describe_source(weights.source.headers))
    if prepared.target == "gguf":
        load_gguf()
        manifest = write_gguf_folder(
            out, lowered, weights, dtype=dtype, codes=codes, origin=origin, overwrite=overwrite
        )
    elif codes:
        raise UsageError("codes are kept by --to gguf; stock classes hold floats")
    else:
        manifest = write_stock(
            out,
            lowered,
            weights.fetch,
            source=weights.source.folder,
            dtype=dtype,
            origin=origin,
            overwrite=overwrite,
        )
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return {"out": str(out), "bytes": sum(sizes), **prepared.to_dict()}
