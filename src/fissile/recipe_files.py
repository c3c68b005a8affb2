"""Reading recipes: YAML files, `extends:`, `--set` items, and messages that name the mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from fissile.config import Recipe, Strict
from fissile.errors import RecipeError
from fissile.registry import suggest

Settings = TypeVar("Settings", bound=Strict)


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
        f" (shipped: {', '.join(shipped)})"
    )


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, follow `extends:`, apply `key=value` overrides, validate.

    Args:
        path: YAML file; `extends: other.yaml` is resolved beside it.
        overrides: dotted assignments as given to `--set`, values in YAML syntax.

    Raises:
        RecipeError: unreadable, unknown keys (with a suggestion), values out of range.
    """
    data = _read_chain(path, seen=())
    for item in overrides or []:
        _assign(data, item)
    return parse_recipe(data, where=str(path))


def parse_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping; all mistakes are reported in one line, joined by "; ".

    Raises:
        RecipeError: unknown keys (with a suggestion) or values out of range.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as err:
        lines = "; ".join(_explain(dict(e)) for e in err.errors())
        raise RecipeError(f"{where}: {lines}") from None


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
        lines = "; ".join(_explain(dict(e), kind) for e in err.errors())
        raise RecipeError(f"--set: {lines}") from None


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: extends itself")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as err:
        raise RecipeError(f"{path}: cannot be read ({err})") from None
    except yaml.YAMLError as err:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(err).split())})") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping, found {type(data).__name__}")
    base = data.pop("extends", None)
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


def _explain(error: dict[str, Any], owner: Any = None) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error['input']!r})"
    owner = owner or Recipe
    for part in error["loc"][:-1]:
        owner = owner.model_fields[part].annotation
    known = sorted(owner.model_fields)
    hint = suggest(str(error["loc"][-1]), known) or f" (known: {', '.join(known)})"
    return f"{where}: unknown key{hint}"
