"""Whether a checkpoint belongs to a family, and if not, exactly why not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fissile.errors import CorruptCheckpoint, UnsupportedModel
from fissile.families.artifact import artifact_tensors
from fissile.families.base import GATED_ACTIVATIONS, Family
from fissile.families.names import dense_names
from fissile.families.table import ARTIFACT_TYPE, FAMILIES, SIZE_FIELDS, dims_of, setting
from fissile.io.headers import (
    SINGLE_FILE,
    CheckpointHeaders,
    TensorInfo,
    open_checkpoint_headers,
)
from fissile.registry import suggest

FLOATS = ("F32", "BF16", "F16")
"""Dtypes in which a dense checkpoint may store its weights."""

ATTENTION_TYPES = ("full_attention", "sliding_attention")
MAX_LAYERS = 10_000
"""More layers than this are a mistake in config.json; it bounds the work of every check."""

_SHOWN = 3
# Old exports store the rotary frequencies, which are computed and never read.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

_REMEDIES = {
    "gemma3": (
        "extract the text model with transformers: m = Gemma3ForConditionalGeneration."
        "from_pretrained(SRC, dtype='auto'); t = Gemma3ForCausalLM(m.config.text_config); "
        "t.model, t.lm_head = m.model.language_model, m.lm_head; t.save_pretrained(OUT)"
    ),
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `ok` says whether it is handled."""

    field: str
    found: str
    accepted: str
    ok: bool
    remedy: str = ""

    def __str__(self) -> str:
        remedy = f"; {self.remedy}" if self.remedy and not self.ok else ""
        return f"{self.field}: found {self.found}, accepted: {self.accepted}{remedy}"


def find(config: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, dense checkpoint or artifact.

    Raises:
        UnsupportedModel: names the first field that is not handled, its value and what is accepted.
    """
    for check in explain(config):
        if not check.ok:
            raise UnsupportedModel(f"config.json: {check}")
    return _named(config)


def explain(config: Mapping[str, Any], headers: CheckpointHeaders | None = None) -> list[Check]:
    """List everything that decides whether a model is handled.

    Args:
        config: contents of config.json.
        headers: if given, names, shapes and dtypes of the tensors are checked too.
    """
    checks = [_type_check(config)]
    if not checks[0].ok:
        return checks
    family = _named(config)
    checks += _config_checks(family, config)
    if headers is not None and all(check.ok for check in checks):
        problems = list(_limited(_tensor_problems(headers, family)))
        found = "; ".join(problems) or f"{len(headers.tensors)} tensors as expected"
        checks.append(Check("tensors", found, f"those of {family.name}", not problems))
    return checks


def explain_source(folder: Path) -> list[Check]:
    """`explain` for a checkpoint folder, from its config.json and headers.

    Raises:
        UsageError, UnsupportedModel, CorruptCheckpoint: the folder cannot be read as a checkpoint.
    """
    headers = open_checkpoint_headers(folder)
    return explain(headers.config, headers)


def check_checkpoint(headers: CheckpointHeaders, family: Family) -> None:
    """Compare names, shapes and dtypes of all tensors with what config.json promises.

    Raises:
        CorruptCheckpoint: names folder and first offenders, with shapes found and expected.
    """
    problems = list(_limited(_tensor_problems(headers, family)))
    if problems:
        raise CorruptCheckpoint(f"{headers.folder}: {'; '.join(problems)}")


def promised_headers(folder: Path, config: Mapping[str, Any]) -> CheckpointHeaders:
    """Headers of the checkpoint that a config.json describes, as if it lay in `folder`, bfloat16.

    Raises:
        UnsupportedModel: the config is of no known family.
    """
    family, end = find(config), 0
    tensors: dict[str, tuple[Path, TensorInfo]] = {}
    for _, source in dense_names(family, config):
        for name in source.names:
            begin, end = end, end + 2 * prod(source.stored)
            tensors[name] = (folder / SINGLE_FILE, TensorInfo("BF16", source.stored, begin, end))
    return CheckpointHeaders(folder, dict(config), tensors, end)


def _named(config: Mapping[str, Any]) -> Family:
    if config["model_type"] == ARTIFACT_TYPE:
        return FAMILIES[config["backbone"]["family"]]
    return next(f for f in FAMILIES.values() if config["model_type"] in f.model_types)


def _type_check(config: Mapping[str, Any]) -> Check:
    found = config.get("model_type")
    known = sorted(name for family in FAMILIES.values() for name in family.model_types)
    if found != ARTIFACT_TYPE:
        remedy = _REMEDIES.get(str(found)) or suggest(str(found), known).removeprefix("; ")
        return Check("model_type", repr(found), ", ".join(known), found in known, remedy)
    backbone = config.get("backbone")
    family = backbone.get("family") if isinstance(backbone, dict) else None
    ok = isinstance(family, str) and family in FAMILIES
    names = sorted(FAMILIES)
    near = suggest(str(family), names).removeprefix("; ")
    return Check("backbone.family", repr(family), ", ".join(names), ok, near)


def _config_checks(family: Family, config: Mapping[str, Any]) -> Iterator[Check]:
    for name in SIZE_FIELDS:
        value = config.get(name)
        ok = type(value) is int and value > 0
        yield Check(name, repr(value), "a positive integer", ok)
        if not ok:
            return
    if config["num_hidden_layers"] > MAX_LAYERS:
        found = repr(config["num_hidden_layers"])
        yield Check("num_hidden_layers", found, f"at most {MAX_LAYERS}", False)
        return
    try:
        dims_of(family, config)
    except UnsupportedModel as err:
        found = str(err).removeprefix("config.json: ")
        yield Check("sizes", found, "sizes that fit together", False)
        return
    name = family.activation_field
    value = setting(family, config, name)
    yield Check(name, repr(value), ", ".join(GATED_ACTIVATIONS), value in GATED_ACTIVATIONS)
    for name, values in family.accepted.items():
        value = setting(family, config, name)
        yield Check(name, repr(value), " or ".join(map(repr, values)), value in values)
    yield _layer_types_check(family, config)
    value = config.get("quantization_config")
    method = value.get("quant_method") if isinstance(value, dict) else value
    remedy = "start from the unquantized checkpoint"
    yield Check("quantization_config", repr(method), "None", value is None, remedy)


def _layer_types_check(family: Family, config: Mapping[str, Any]) -> Check:
    types = config.get("layer_types")
    if types is None:
        return Check("layer_types", "None", "None", True)
    if not family.mixed_attention and config["model_type"] != ARTIFACT_TYPE:
        found = ", ".join(sorted(map(str, set(types)))) if isinstance(types, list) else repr(types)
        return Check("layer_types", found, "None", False)
    layers = config["num_hidden_layers"]
    accepted = f"{layers} of {', '.join(ATTENTION_TYPES)}"
    if not isinstance(types, list):
        return Check("layer_types", repr(types), accepted, False)
    found = f"{len(types)} of {', '.join(sorted(set(map(str, types))))}"
    ok = len(types) == layers and all(kind in ATTENTION_TYPES for kind in types)
    return Check("layer_types", found, accepted, ok)


def _tensor_problems(headers: CheckpointHeaders, family: Family) -> Iterator[str]:
    try:
        expected = list(_expected(headers, family))
    except CorruptCheckpoint as err:
        yield str(err)
        return
    tied = dims_of(family, headers.config).tied
    seen = set()
    for name, shape, dtypes in expected:
        seen.add(name)
        if name not in headers.tensors:
            yield f"tensor {name} is missing"
            continue
        path, info = headers.tensors[name]
        if info.shape != shape:
            yield f"{path.name}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}"
        if info.dtype not in dtypes:
            yield f"{path.name}: tensor {name} is {info.dtype}, accepted: {', '.join(dtypes)}"
    for name in headers.tensors:
        # Some writers store a tied head again; it is not read.
        known = name in seen or _HARMLESS.fullmatch(name) or (tied and name == "lm_head.weight")
        if not known:
            yield f"tensor {name} has no place in a model of the family {family.name}"


def _expected(
    headers: CheckpointHeaders, family: Family
) -> Iterator[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    if headers.config["model_type"] == ARTIFACT_TYPE:
        for name, (dtype, shape) in artifact_tensors(family, headers.config):
            yield name, shape, FLOATS if dtype is None else (dtype,)
        return
    for _, source in dense_names(family, headers.config):
        for name in source.names:
            yield name, source.stored, FLOATS


def _limited(problems: Iterable[str]) -> Iterator[str]:
    """The first few problems, and how many more there are."""
    more = 0
    for count, problem in enumerate(problems):
        if count < _SHOWN:
            yield problem
        else:
            more += 1
    if more:
        yield f"and {more} more"
