"""The site builds without a warning, its links lead somewhere, and no page is long."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from tests.docs.snippets import DOCS, ROOT, snippets_of

import fissile
from fissile.cli.main import COMMANDS, build_parser
from fissile.recipe_files import find_recipe, load_recipe, parse_settings
from fissile.run.bench import BENCHES

MOST_WORDS = 1500
VOID = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """What a page holds: words of its article, ids, links, and what the browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical":
            self.loads.append(found.get("href", ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "article" in self._open and not {"script", "style"} & set(self._open):
            self.text.append(data)

    @property
    def words(self) -> int:
        """Words of the article, code and tables included."""
        return len(" ".join(self.text).split())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. Warnings are errors; proxies that do not exist show any use of a network."""
    pytest.importorskip("mkdocs", reason="the documentation is built from Python 3.11 on")
    out = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)],
        cwd=ROOT,
        env={
            **os.environ,
            **nowhere,
            "PYTHONPATH": str(ROOT / "src"),
            "NO_MKDOCS_2_WARNING": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


@cache
def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text("utf-8"))
    return page


def pages(site: Path) -> dict[str, Page]:
    names = {p.relative_to(site).as_posix(): p for p in sorted(site.rglob("*.html"))}
    return {name: read(path) for name, path in names.items() if name != "404.html"}


def dead(site: Path) -> Iterator[str]:
    """Links and loads within the site that lead nowhere."""
    for name, page in pages(site).items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = ((site / name).parent / unquote(parts.path)).resolve() if parts.path else None
            target = path or site / name
            if not target.is_file():
                yield f"{name}: {link}"
            elif target.suffix == ".html" and parts.fragment:
                known = read(target).ids
                yield from () if unquote(parts.fragment) in known else (f"{name}: {link}",)


def test_no_page_is_long(site: Path) -> None:
    words = {name: page.words for name, page in pages(site).items()}
    assert len(words) > 40
    assert min(words.values()) > 20
    assert {name: count for name, count in words.items() if count > MOST_WORDS} == {}


def test_no_link_is_dead(site: Path) -> None:
    assert sum(len(page.links) for page in pages(site).values()) > 500
    assert list(dead(site)) == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    found = {load for page in pages(site).values() for load in page.loads}
    assert len(found) > 3
    assert [load for load in found if urlsplit(load).netloc] == []
    styles = [path.read_text("utf-8") for path in site.rglob("*.css")]
    assert not any(re.search(r"url\(['\"]?(https?:)?//", text) for text in styles)


def test_a_dead_link_and_a_long_page_are_noticed(tmp_path: Path) -> None:
    html = (
        '<article id="a">w w w<a href="b.html">x</a><a href="#c">y</a><a href="#a">z</a></article>'
    )
    (tmp_path / "index.html").write_text(html + "<p>not counted</p>")
    assert sorted(dead(tmp_path)) == ["index.html: #c", "index.html: b.html"]
    assert read(tmp_path / "index.html").words == 6


def test_every_command_and_public_name_is_described(site: Path) -> None:
    found = pages(site)
    assert {f"commands/{name}.html" for name in COMMANDS} <= set(found)
    ids = set().union(*(page.ids for name, page in found.items() if name.startswith("python/")))
    tables = [fissile._OWN, *fissile._ROOMS.values()]
    names = {target.replace(":", ".") for table in tables for target in table.values()}
    assert len(names) > 40
    assert names - ids == set()


def test_every_recipe_key_is_described() -> None:
    recipe_pages = import_module("recipe_pages")
    keys = recipe_pages.keys()
    assert len(keys) > 90
    assert [key for key, field in keys.items() if not field.description] == []
    text = "\n".join(recipe_pages.pages().values())
    assert [key for key in keys if text.count(f"| `{key}` |") != 1] == []
    assert "| `quantize.group_size` | `32`, `64`, `128` | `64` |" in text
    assert "| `extract.num_experts` | integer, ≥ 2 and ≤ 256 | `8` |" in text


def test_figures_are_those_of_the_stored_results() -> None:
    """Drawn again, they say the same and have the same shapes."""
    drawn = import_module("figures").drawings()
    stored = {path.stem: path.read_text("utf-8") for path in (DOCS / "figures").glob("*.svg")}
    assert set(drawn) == set(stored)
    for name, text in drawn.items():
        for part in (r">([^<>]+)</text>", r'\bd="([^"]+)"', r"translate\(([^)]+)\)"):
            new, old = re.findall(part, text), re.findall(part, stored[name])
            assert numbers(new) == pytest.approx(numbers(old), abs=0.02), (name, part)
            assert words(new) == words(old), (name, part)
        used = f"figures/{name}.svg"
        assert any(used in path.read_text("utf-8") for path in DOCS.rglob("*.md")), used


def numbers(parts: list[str]) -> list[float]:
    return [float(n) for part in parts for n in re.findall(r"-?\d+(?:\.\d+)?", part)]


def words(parts: list[str]) -> list[str]:
    return [re.sub(r"-?\d+(?:\.\d+)?", "", part) for part in parts]


def test_every_stored_result_has_a_table_and_every_table_is_on_a_page() -> None:
    tables = import_module("result_tables")
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    text = "\n".join(path.read_text("utf-8") for path in pages)
    files = {path.name for path in (ROOT / "eval" / "results").iterdir()}
    assert {name for name in files if name not in text} == set()
    assert {f"<!-- table: {name} -->" for name in tables.TABLES} <= set(text.splitlines())
    filled = tables.fill("<!-- table: demo-routing -->")
    dense = tables.stored("demo")["dense"]["ppl"]
    assert f"Dense: {dense:.2f}" in filled
    with pytest.raises(KeyError):
        tables.fill("<!-- table: no-such -->")


def test_benchmarks_that_made_the_results_are_named_as_they_are_called() -> None:
    """They run for hours: the words parse, and every setting and recipe key is one."""
    page = (DOCS / "more-results.md").read_text("utf-8")
    found = re.findall(r"^fissile bench \w+ .+$", page, re.MULTILINE)
    assert len(found) >= 8
    parser, _ = build_parser()
    for command in found:
        args = parser.parse_args(shlex.split(command)[1:])
        settings = BENCHES[args.name].settings
        values = parse_settings(settings, args.set).model_dump()
        assert not args.models or "models" in values
        if change := values.get("change"):
            load_recipe(find_recipe(values["recipe"]), list(change))


def test_generated_pages_hold_no_command_that_is_not_run() -> None:
    """The examples of the reference are those of the help, which test_snippets.py runs."""
    for name, text in import_module("command_pages").pages().items():
        for snippet in snippets_of(name, text):
            assert snippet.text.startswith("fissile "), snippet
