"""The size and style budget of the source, held by reading its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("refactor", "quant", "kernels", "eval", "recipes", "src/fissile")
MAX_FILE, MAX_FUNCTION = 400, 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    """Every source file by its path from the root; the links are not followed, so each once."""
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return {str(p.relative_to(ROOT)): ast.parse(p.read_text("utf-8")) for p in paths}


def offenders(rule: Callable[[ast.Module], Iterable[object]]) -> dict[str, list[object]]:
    return {name: found for name, tree in trees().items() if (found := list(rule(tree)))}


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def too_long(tree: ast.Module) -> Iterator[str]:
    for function in functions(tree):
        first = min([function.lineno, *(item.lineno for item in function.decorator_list)])
        lines = (function.end_lineno or first) - first + 1
        if lines > MAX_FUNCTION:
            yield f"{function.name}: {lines} lines"


def unannotated(tree: ast.Module) -> Iterator[str]:
    methods = {
        id(item)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, Function)
        and not any(ast.unparse(d) == "staticmethod" for d in item.decorator_list)
    }
    for function in functions(tree):
        spec = function.args
        named = [*spec.posonlyargs, *spec.args][id(function) in methods :]
        rest = [arg for arg in (spec.vararg, spec.kwarg) if arg is not None]
        for arg in [*named, *spec.kwonlyargs, *rest]:
            if arg.annotation is None:
                yield f"{function.name}({arg.arg})"


def undocumented(tree: ast.Module) -> Iterator[str]:
    if ast.get_docstring(tree) is None:
        yield "the module"
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield node.name


def broad(handler: ast.ExceptHandler) -> bool:
    """True for `except:`, `except Exception` and `except BaseException`, alone or in a tuple."""
    if handler.type is None:
        return True
    caught = {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}
    return not caught.isdisjoint({"Exception", "BaseException"})


def swallowing(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and broad(node):
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if node.type is None or not raises:
                yield node.lineno


def printing(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            yield node.lineno


def using_global(tree: ast.Module) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            yield node.lineno


def evaluating_annotations(tree: ast.Module) -> Iterator[str]:
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    names = {alias.name for node in imports for alias in node.names}
    if functions(tree) and "annotations" not in names:
        yield "no __future__ annotations"


def test_all_the_folders_are_read() -> None:
    read = {name.split("/")[0] for name in trees()}
    assert read >= {"refactor", "quant", "kernels", "eval", "src"}


def test_files_are_short() -> None:
    paths = [ROOT / name for name in trees()] + sorted((ROOT / "tests").rglob("*.py"))
    lengths = {path.name: len(path.read_text("utf-8").splitlines()) for path in paths}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE} == {}


def test_functions_are_short() -> None:
    assert offenders(too_long) == {}


def test_every_parameter_is_annotated() -> None:
    assert offenders(unannotated) == {}


def test_public_names_have_docstrings() -> None:
    assert offenders(undocumented) == {}


def test_only_the_command_line_prints() -> None:
    found = offenders(printing)
    assert {name for name in found if not name.startswith("src/fissile/cli/")} == set()


def test_no_global_statement() -> None:
    assert offenders(using_global) == {}


def test_no_exception_is_swallowed() -> None:
    assert offenders(swallowing) == {}


def test_annotations_are_not_evaluated() -> None:
    assert offenders(evaluating_annotations) == {}


@pytest.mark.parametrize(
    ("rule", "code", "found"),
    [
        (swallowing, "try: f()\nexcept: raise", [2]),
        (swallowing, "try: f()\nexcept Exception: pass", [2]),
        (swallowing, "try: f()\nexcept (OSError, Exception): pass", [2]),
        (swallowing, "try: f()\nexcept Exception as e: raise X from e", []),
        (swallowing, "try: f()\nexcept OSError: pass", []),
        (unannotated, "class C:\n def m(self, a, *b: int, **c): ...", ["m(a)", "m(c)"]),
        (unannotated, "class C:\n @staticmethod\n def s(x): ...", ["s(x)"]),
        (unannotated, "def f(self, y: int, *, z): ...", ["f(self)", "f(z)"]),
        (too_long, "def f():\n" + " x\n" * 59, []),
        (too_long, "@d\ndef f():\n" + " x\n" * 59, ["f: 61 lines"]),
        (undocumented, "'''Doc.'''\ndef f(): ...\ndef _g(): ...", ["f"]),
        (printing, "import x\nx.print()\nprint(1)", [3]),
        (
            evaluating_annotations,
            "from __future__ import division\ndef f(): ...",
            ["no __future__ annotations"],
        ),
        (using_global, "def f():\n    global x\n    x = 1", [2]),
    ],
)
def test_the_rules_themselves(
    rule: Callable[[ast.Module], Iterable[object]], code: str, found: list[object]
) -> None:
    assert list(rule(ast.parse(code))) == found
