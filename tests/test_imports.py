"""Imports go one way, and importing the package or its command line loads nothing heavy."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fissile

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "fissile"
FOLDERS = ("refactor", "quant", "kernels", "recipes", "eval")
HEAVY = ("torch", "triton", "transformers")

# What each room may import from the others; every room may import itself and `fissile.__version__`.
BASE = {"errors", "config", "registry"}
DATA = BASE | {"kernels", "families", "io"}
WORK = DATA | {"models", "workers"}
ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "registry": {"errors"},
    "config_quantize": set(),
    "config": {"errors", "registry", "config_quantize"},
    "recipe_files": BASE,
    "kernels": BASE,
    "io": BASE | {"kernels"},
    "families": BASE | {"kernels", "io"},
    "workers": BASE,
    "models": DATA,
    "quant": WORK,
    "refactor": WORK,
    "eval": WORK,
    "recipes": set(),
    "export": WORK | {"quant", "refactor", "eval"},
    "serve": WORK | {"quant", "eval", "export"},
    "run": WORK | {"recipe_files", "quant", "refactor", "eval", "export", "serve"},
    "cli": WORK | {"recipe_files", "quant", "refactor", "eval", "export", "serve", "run"},
}
# Copied into every artifact, where there is no fissile: they import each other and nothing else.
SHIPPED = {
    "fissile.kernels.columns",
    "fissile.kernels.layout",
    "fissile.models.configuration_fissile",
    "fissile.models.modeling_fissile",
    "fissile.models.modules_fissile",
    "fissile.models.nested_fissile",
    "fissile.models.routers_fissile",
    "fissile.models.stacks_fissile",
}
LEAN = (
    "fissile",
    "fissile.cli.main",
    "fissile.config",
    "fissile.recipe_files",
    "fissile.errors",
    "fissile.registry",
    "fissile.families",
    "fissile.io.headers",
    "fissile.io.manifest",
    "fissile.run.plan",
    "fissile.run.journal",
    "fissile.run.ledger",
)


def source_files() -> list[Path]:
    """Every module below src/fissile, the linked folders included (rglob does not follow links)."""
    roots = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_symlink())]
    return sorted({path for root in roots for path in root.rglob("*.py")})


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def module_parts(path: Path) -> list[str]:
    return ["fissile", *path.relative_to(PACKAGE).with_suffix("").parts]


def room_of(path: Path) -> str:
    return module_parts(path)[1]


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[ast.stmt, str]]:
    """Yield (statement, dotted name) of every import, relative ones resolved."""
    parts = module_parts(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parts[: len(parts) - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{stem}.{alias.name}") for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports from this package."""
    names = {name for _, name in imported(tree_of(path), path)}
    return {name for name in names if name.split(".")[0] == "fissile"}


def rooms_imported(path: Path) -> set[str]:
    names = [name.split(".") for name in own_imports(path)]
    rooms = {name[1] for name in names if len(name) > 1 and name[1] in ALLOWED}
    return rooms - {room_of(path)}


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run when the module is imported, TYPE_CHECKING blocks left out."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_imports_go_one_way() -> None:
    paths = source_files()
    assert {room_of(path) for path in paths} <= set(ALLOWED), (
        "a new room needs a place in the order"
    )
    wrong = {str(p): found for p in paths if (found := rooms_imported(p) - ALLOWED[room_of(p)])}
    assert wrong == {}


def test_what_ships_with_an_artifact_stands_alone() -> None:
    paths = {".".join(module_parts(path)): path for path in source_files()}
    for module in sorted(SHIPPED):
        owners = {name.rpartition(".")[0] for name in own_imports(paths[module])}
        assert owners <= SHIPPED, module


def test_the_order_has_no_cycle() -> None:
    settled: set[str] = set()
    while ready := {r for r, needs in ALLOWED.items() if r not in settled and needs <= settled}:
        settled |= ready
    assert settled == set(ALLOWED)


def test_the_five_folders_are_never_imported_by_their_bare_names() -> None:
    paths = [*source_files(), *sorted((ROOT / "tests").rglob("*.py"))]
    found = []
    for path in paths:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            found += [(path.name, name) for name in names if name.split(".")[0] in FOLDERS]
    assert found == []


def holds_kernels(path: Path) -> bool:
    """Kernels are decorated functions, so their modules cannot be imported without Triton."""
    return path.parent.name == "kernels" and path.stem.startswith("triton_")


def needs_vllm(path: Path) -> bool:
    """The one module that vLLM itself imports."""
    return path.parent.name == "vllm_plugin" and path.stem == "model"


def test_triton_is_imported_inside_functions_only() -> None:
    """Directly, and by way of the modules that hold kernels."""
    found = []
    for path in source_files():
        for node in at_import_time(tree_of(path)):
            names = [name for _, name in imported(ast.Module([node], []), path)]
            heavy = ("triton", "fissile.kernels.triton_")
            found += [str(path) for name in names if name.startswith(heavy)]
    kernels = {str(path) for path in source_files() if holds_kernels(path)}
    assert set(found) == kernels != set()


def test_import_time_statements_are_found_where_they_are() -> None:
    code = "if x:\n    import a\nclass C:\n    import b\ndef f():\n    import c\n"
    found = [node for node in at_import_time(ast.parse(code)) if isinstance(node, ast.Import)]
    assert sorted(node.names[0].name for node in found) == ["a", "b"]


@pytest.mark.parametrize("module", LEAN)
def test_module_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["recipes", "schema"]])
def test_parser_and_help_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom fissile.cli.main import build_parser, main\n"
        f"build_parser()\nassert main({words!r}) == 0\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert run_python(code) == "[]"


@pytest.fixture(scope="module")
def after_importing_everything() -> dict[str, object]:
    triton = importlib.util.find_spec("triton") is not None
    paths = [path for path in source_files() if triton or not holds_kernels(path)]
    paths = [path for path in paths if not needs_vllm(path)]
    names = [".".join(module_parts(path)) for path in paths]
    modules = [n.removesuffix(".__init__") for n in names if not n.endswith("__main__")]
    code = (
        f"import importlib, json, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        # Only what lies in the folders counts: transformers itself looks for a package `kernels`.
        f"import torch\nours = {FOLDERS!r}\n"
        "bare = sorted(m for m in sys.modules if '.' in m and m.split('.')[0] in ours)\n"
        "print(json.dumps({'gpu': torch.cuda.is_initialized(), 'bare': bare}))"
    )
    return dict(json.loads(run_python(code)))


def test_importing_every_module_touches_no_gpu(
    after_importing_everything: dict[str, object],
) -> None:
    assert after_importing_everything["gpu"] is False


def test_modules_import_under_one_name_only(after_importing_everything: dict[str, object]) -> None:
    """`quant.x` beside `fissile.quant.x` would be two module objects of one file."""
    assert after_importing_everything["bare"] == []


def test_every_lazy_name_exists() -> None:
    """What the rooms promise can be imported, under the name it is promised."""
    for room, table in fissile._ROOMS.items():
        module = importlib.import_module(room)
        for name in table:
            assert getattr(module, name).__name__ == name
    for name in fissile._OWN:
        assert callable(getattr(fissile, name))
    misspelt = "slove"
    with pytest.raises(AttributeError, match="no attribute 'slove'"):
        getattr(fissile.quant, misspelt)
