"""MkDocs hooks: pages that are generated from the code and from stored results at every build.

Nothing that is generated is committed, so nothing of it can be out of date.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import api_pages
import command_pages
import recipe_pages
import result_tables
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

SECTIONS = {
    "Recipe keys": recipe_pages.pages,
    "Commands": command_pages.pages,
    "Python": api_pages.pages,
}


STAGE = Path(tempfile.mkdtemp(prefix="fissile-docs-"))


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the generated sections to the navigation, and say where the docstrings are."""
    stage_sources(Path(config.config_file_path).parent / "src" / "fissile", STAGE / "fissile")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(STAGE)]
    nav: list[Any] = list(config.nav or [])
    nav += [{title: list(make())} for title, make in SECTIONS.items()]
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for make in SECTIONS.values():
        for path, text in make().items():
            files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put tables of stored results where a page asks for them."""
    return result_tables.fill(markdown)


def on_shutdown() -> None:
    """Remove what was staged."""
    shutil.rmtree(STAGE, ignore_errors=True)


def stage_sources(package: Path, out: Path) -> None:
    """Copy the sources, links followed, an `__init__.py` in every folder.

    The reader of docstrings skips folders without one, and five of ours have none (CONTRIBUTING.md
    says why).
    """
    shutil.copytree(
        package, out, ignore=lambda _, names: [n for n in names if "." in n and n[-3:] != ".py"]
    )
    for folder in (path for path in out.rglob("*") if path.is_dir()):
        (folder / "__init__.py").touch()
