"""The keys of a recipe, their types, bounds, defaults and meaning, from the pydantic models."""

from __future__ import annotations

import json
import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fissile.config import Recipe

BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
INTRO = """# Recipes

A recipe is a YAML file; every key may be left out. `fissile recipes show NAME` prints a recipe with
all defaults filled in, `fissile recipes schema` the JSON schema for editors, and
`--set section.key=value` changes one value for one call. A misspelt key is refused with the nearest
one that exists. `extends: other.yaml` takes what another file, named relative to this one, says,
and changes only what is given.
"""


def pages() -> dict[str, str]:
    """Path below docs/ to Markdown: an index with the keys outside sections, a page a section."""
    sections = {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }
    found = {"recipe-keys/index.md": _index(sections)}
    for name, model in sections.items():
        body = "\n\n".join([f"# {name}", _doc(model), *_tables(model, name)])
        found[f"recipe-keys/{name}.md"] = body + "\n"
    return found


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Every key of a recipe that holds a value, by its dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= keys(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def _index(sections: dict[str, Any]) -> str:
    top = _table({n: f for n, f in Recipe.model_fields.items() if n not in sections}, "")
    rows = [f"| [`{name}`]({name}.md) | {_cell(_doc(model))} |" for name, model in sections.items()]
    listed = "| section | |\n|---|---|\n" + "\n".join(rows)
    return f"{INTRO}\n## Sections\n\n{listed}\n\n## Keys outside sections\n\n{top}\n"


def _tables(model: type[BaseModel], prefix: str) -> list[str]:
    plain = {n: f for n, f in model.model_fields.items() if not _is_section(f)}
    parts = [_table(plain, f"{prefix}.")]
    for name, field in model.model_fields.items():
        if _is_section(field):
            inner: Any = field.annotation
            parts += [f"## {prefix}.{name}", _doc(inner), *_tables(inner, f"{prefix}.{name}")]
    return parts


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _doc(model: type[BaseModel]) -> str:
    return "\n\n".join(" ".join(p.split()) for p in (model.__doc__ or "").split("\n\n"))


def _table(fields: dict[str, FieldInfo], prefix: str) -> str:
    rows = [
        f"| `{prefix}{name}` | {_accepts(field)} | {_default(field)} |"
        f" {_cell(field.description or '')} |"
        for name, field in fields.items()
    ]
    return "| key | accepts | default | |\n|---|---|---|---|\n" + "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True, validated_data={})
    text = json.dumps(value, ensure_ascii=False)
    return f"`{text}`"


def _accepts(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {limit:g}"
        for item in field.metadata
        for name, sign in BOUNDS.items()
        if (limit := getattr(item, name, None)) is not None
    ]
    kind = _kind(field.annotation)
    return f"{kind}, {' and '.join(bounds)}" if bounds else kind


def _kind(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is type(None):
        return "null"
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in inner)
    if origin is tuple:
        return f"list of: {_kind(inner[0])}"
    if origin is dict:
        return f"mapping of {_kind(inner[0])} to {_kind(inner[1])}"
    names = {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}
    return names.get(getattr(kind, "__name__", ""), str(kind))


def _cell(text: str) -> str:
    return re.sub(r"([<>|*_\[\]])", r"\\\1", " ".join(text.split()))
