"""What a folder is: dense checkpoint, artifact or run folder; read from headers alone."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from fissile import families
from fissile.families.artifact import float_shapes, is_loaded, nested_parts, plan_summary
from fissile.families.base import Family
from fissile.families.table import ARTIFACT_TYPE
from fissile.io.headers import CheckpointHeaders, checkpoint_folder, open_checkpoint_headers
from fissile.io.hub import describe_source, has_tokenizer
from fissile.io.manifest import MANIFEST_FILE, check_manifest, read_manifest

_RUN_FILES = ("recipe.yaml", "plan.json", "ledger.csv", "metrics.json", "report.html")


def inspect_source(source: Path, *, hashes: bool = False) -> dict[str, Any]:
    """Describe a model, an artifact or a run folder as JSON-able data.

    Args:
        source: the folder.
        hashes: compare the contents of an artifact with its manifest, which reads all its bytes;
            otherwise only names and sizes are compared.

    Raises:
        UsageError: no such folder, or nothing in it.
        UnsupportedModel: pickled weights. A model of an unknown family is described, not refused.
        CorruptCheckpoint: files that are not what they should be.
    """
    headers = open_checkpoint_headers(source)
    found: dict[str, Any] = {"kind": _kind(headers), "folder": str(headers.folder)}
    found |= _run(Path(source))
    found |= _weights(headers)
    checks = families.explain(headers.config, headers)
    refused = [check for check in checks if not check.ok]
    found["supported"] = not refused
    if refused:
        found["problem"] = str(refused[0])
    else:
        family = families.find(headers.config)
        found |= _sizes(headers, family)
        if headers.config.get("model_type") == ARTIFACT_TYPE:
            found |= _artifact(headers, family)
    found["tokenizer"] = has_tokenizer(headers.folder)
    found |= _manifest(headers.folder, hashes)
    return found


def _kind(headers: CheckpointHeaders) -> str:
    config = headers.config
    if config.get("model_type") != ARTIFACT_TYPE:
        return "dense checkpoint"
    routed = "routed" if config.get("routing") else "dense"
    return f"artifact, {routed}, {'bit-nested' if config.get('nested') else 'float'} weights"


def _run(source: Path) -> dict[str, Any]:
    if checkpoint_folder(source) == source:
        return {}
    return {"run": {name: (source / name).is_file() for name in _RUN_FILES}}


def _weights(headers: CheckpointHeaders) -> dict[str, Any]:
    files = Counter(path.name for path, _ in headers.tensors.values())
    dtypes = Counter(info.dtype for _, info in headers.tensors.values())
    return {
        "files": len(files),
        "tensors": len(headers.tensors),
        "total_bytes": headers.total_bytes,
        "dtypes": dict(sorted(dtypes.items())),
        "source": describe_source(headers),
    }


def _sizes(headers: CheckpointHeaders, family: Family) -> dict[str, Any]:
    dims = families.dims_of(family, headers.config)
    if headers.config.get("model_type") == ARTIFACT_TYPE:
        shapes = [shape for _, shape in float_shapes(family, headers.config)]
    else:
        shapes = [source.shape for _, source in families.dense_names(family, headers.config)]
    return {
        "family": family.name,
        "parameters": sum(map(prod, shapes)),
        "layers": dims.layers,
        "hidden_size": dims.hidden,
        "intermediate_size": dims.ffn,
        "heads": dims.heads,
        "kv_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "vocab_size": dims.vocab,
        "tied_embeddings": dims.tied,
    }


def _artifact(headers: CheckpointHeaders, family: Family) -> dict[str, Any]:
    found: dict[str, Any] = {}
    config = headers.config
    if routing := config.get("routing"):
        found["routing"] = _routing(routing, families.dims_of(family, config).ffn)
    if nested := config.get("nested"):
        found["widths"] = list(nested["widths"])
        if (plan := plan_summary(config)) is not None:
            found["plan"] = plan
        else:
            found["default_bits"] = config.get("bits") or max(nested["widths"])
        found["group_size"] = nested["group_size"]
        found["tied_floats"] = bool(nested.get("tied"))
        found["nested_tensors"] = len(nested["modules"])
        found["by_width"] = _by_width(headers, nested, _nested_weights(headers, family))
    return found


def _routing(routing: dict[str, Any], ffn: int) -> dict[str, Any]:
    shared, top_k = routing["shared_sizes"], routing["top_k"]
    found = {
        "kind": routing["kind"],
        "num_experts": routing["num_experts"],
        "top_k": top_k,
        "shared_neurons": sorted({*shared}),
        "layout": routing["layout"],
    }
    if routing["kind"] != "static" and routing["layout"] == "disjoint":
        found["expert_neurons"] = sorted({*routing["expert_sizes"]})
        pairs = zip(shared, routing["expert_sizes"], strict=True)
        active = [s + top_k * m for s, m in pairs]
        found["active_share"] = round(sum(active) / (ffn * len(active)), 6)
    if routing["kind"] == "static":
        found["active_share"] = round(sum(shared) / (ffn * len(shared)), 6)
    return found


def _nested_weights(headers: CheckpointHeaders, family: Family) -> int:
    modules = {*headers.config["nested"]["modules"]}
    return sum(prod(s) for name, s in float_shapes(family, headers.config) if name in modules)


def _by_width(
    headers: CheckpointHeaders, nested: dict[str, Any], weights: int
) -> list[dict[str, Any]]:
    """Bytes that a load at each width reads, and bits per nested weight, floats included."""
    widths, tied = nested["widths"], bool(nested.get("tied"))
    packed = dict.fromkeys(widths, 0)
    total = floats = 0
    suffixes = {*nested_parts((8,), tuple(widths), 8, tied)}
    for name, (_, info) in headers.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if suffix not in suffixes or stem not in nested["modules"]:
            floats += info.nbytes
            continue
        total += info.nbytes
        for bits in packed:
            packed[bits] += info.nbytes * is_loaded(suffix, bits, widths, tied)
    rows = [
        {
            "bits": bits,
            "loaded_bytes": count + floats,
            "bits_per_weight": round(8 * count / max(weights, 1), 4),
        }
        for bits, count in packed.items()
    ]
    rows.append({"bits": "all", "loaded_bytes": total + floats})
    rows[-1]["bits_per_weight"] = round(8 * total / max(weights, 1), 4)
    return rows


def _manifest(folder: Path, hashes: bool) -> dict[str, Any]:
    if not (folder / MANIFEST_FILE).is_file():
        return {}
    manifest = read_manifest(folder)
    problems = check_manifest(folder, hashes=hashes)
    return {
        "manifest": {
            "files": len(manifest["files"]),
            "compared": "contents" if hashes else "names and sizes",
            "problems": problems,
            "recipe_sha256": manifest.get("recipe_sha256"),
            "seed": manifest.get("seed"),
            "versions": manifest.get("versions", {}),
        }
    }
