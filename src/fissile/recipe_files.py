"""Reading recipes: YAML files, `extends:`, `--set` items, and messages that name the mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from fissile.config import Recipe, Strict
from fissile.errors import RecipeError
from fissile.registry import suggest

Settings = TypeVar("Settings", bound=Strict)

BASE_KEY = "extends"
"""Key of a recipe file that names the file it builds on; it is no part of the recipe itself."""
PUBLISHED = "config.json"
"""Beside a shipped recipe: what the model's publisher states in its config.json."""


def recipe_folder() -> Path:
    """Folder of the recipes that ship with the package."""
    return Path(__file__).resolve().parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name ("demo/moe-nested") to file of every shipped recipe; files named "_*" are bases."""
    root = recipe_folder()
    files = sorted(p for p in root.rglob("*.yaml") if not p.name.startswith("_"))
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in files}


def find_recipe(name: str) -> Path:
    """Resolve a recipe argument: an existing file, or the name of a shipped recipe.

    Raises:
        RecipeError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    key = name.removeprefix("recipes/").removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    raise RecipeError(
        f"recipe {name!r} is neither a file nor shipped{suggest(key, list(shipped))}"
        " (`fissile recipes` lists those)"
    )


def published_config(path: Path) -> dict[str, Any]:
    """The config.json of the model that a shipped recipe is for, as its publisher states it.

    Args:
        path: the recipe's file.

    Raises:
        RecipeError: no config.json lies beside it.
    """
    config = path.parent / PUBLISHED
    if not config.is_file():
        raise RecipeError(f"{path}: is for no particular model (no {PUBLISHED} beside it)")
    return dict(json.loads(config.read_text(encoding="utf-8")))


def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipe files; unknown keys are errors in it too."""
    schema = Recipe.model_json_schema()
    base = {"type": "string", "description": "file that this one builds on, beside it"}
    schema["properties"] = {BASE_KEY: base, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, follow `extends:`, apply `key=value` overrides, validate.

    Args:
        path: YAML file; `extends: other.yaml` is resolved beside it.
        overrides: dotted assignments as given to `--set`, values in YAML syntax.

    Raises:
        RecipeError: unreadable, unknown keys (with a suggestion), values out of range.
    """
    return parse_recipe(_read_chain(path, seen=()), str(path), overrides or [])


def parse_recipe(
    data: dict[str, Any], where: str = "recipe", overrides: Sequence[str] = ()
) -> Recipe:
    """Validate a mapping; all mistakes are reported in one line, joined by "; ".

    Args:
        data: sections of a recipe; overrides go into it.
        where: what a message names.
        overrides: `KEY=VALUE` items put over it, keys with their section.

    Raises:
        RecipeError: unknown keys (with a suggestion) or values out of range.
    """
    for item in overrides:
        _assign(data, item)
    try:
        return Recipe.model_validate(data)
    except ValidationError as err:
        raise RecipeError(f"{where}: {_explained(err, Recipe, (BASE_KEY,))}") from None


def parse_settings(kind: type[Settings], overrides: list[str]) -> Settings:
    """Defaults of a settings class with `KEY=VALUE` items put over them.

    Raises:
        RecipeError: unknown keys (with a suggestion) or values out of range.
    """
    data: dict[str, Any] = {}
    for item in overrides:
        _assign(data, item)
    try:
        return kind.model_validate(data)
    except ValidationError as err:
        raise RecipeError(f"--set: {_explained(err, kind)}") from None


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: extends itself")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        # Only a base can be missing: the recipe itself was found before.
        near = suggest(path.name, sorted(p.name for p in path.parent.glob("*.yaml")))
        wanted = f"{seen[-1]}: {BASE_KEY} {path}" if seen else str(path)
        raise RecipeError(f"{wanted}: no such file{near}") from None
    except (OSError, UnicodeDecodeError) as err:
        raise RecipeError(f"{path}: cannot be read ({err})") from None
    except yaml.YAMLError as err:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(err).split())})") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping, found {type(data).__name__}")
    base = data.pop(BASE_KEY, None)
    if base is None:
        return data
    return _merge(_read_chain(path.parent / str(base), (*seen, path)), data)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _assign(data: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {item!r}: expected KEY=VALUE, e.g. quantize.group_size=128")
    *parents, leaf = key.split(".")
    node = data
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {item!r}: {name} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {item!r}: the value is not YAML") from None


def _explained(err: ValidationError, owner: type[BaseModel], more: tuple[str, ...] = ()) -> str:
    """All mistakes in one line; `more` are keys that exist at the top beside the owner's."""
    return "; ".join(_explain(dict(e), owner, more) for e in err.errors())


def _explain(error: dict[str, Any], owner: type[BaseModel], more: tuple[str, ...]) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "literal_error":
        words = error["ctx"]["expected"].split("'")[1::2]
        near = suggest(str(error["input"]), words)
        return f"{where}: {error['msg']} (got {error['input']!r}{near})"
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error['input']!r})"
    *parents, key = error["loc"]
    found = _section(owner, parents)
    known = sorted({*found.model_fields, *(() if parents else more)})
    hint = suggest(str(key), known) or _elsewhere(str(key), owner)
    return f"{where}: unknown key{hint or ' (known: ' + ', '.join(known) + ')'}"


def _section(owner: type[BaseModel], parents: list[Any]) -> type[BaseModel]:
    """The model that a place in a recipe belongs to."""
    for part in parents:
        field = owner.model_fields[part].annotation
        kinds = [field, *get_args(field)]
        owner = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return owner


def _elsewhere(key: str, owner: type[BaseModel]) -> str:
    """Where a key that has no place here has one."""
    places = [place for place, name in _keys(owner) if name == key]
    return f"; did you mean {' or '.join(map(repr, places[:2]))}?" if places else ""


def _keys(owner: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted place and name of every key of a model and its sections."""
    for name, field in owner.model_fields.items():
        yield f"{prefix}{name}", name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
