"""Folders with what README and docs name: models, text, a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.docs.snippets import ROOT, Sandbox


@pytest.fixture(scope="session")
def new_sandbox(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    text_file: Path,
    finished_run: Path,
    small_recipe: list[str],
) -> Callable[[], Sandbox]:
    """Makes a folder for documents that build on each other; the tiny model is every model."""

    def make() -> Sandbox:
        folder = tmp_path_factory.mktemp("sandbox")
        (folder / "recipes" / "demo").mkdir(parents=True)
        shutil.copy(ROOT / "recipes" / "demo" / "moe-nested.yaml", folder / "recipes" / "demo")
        for name in ("MODEL_DIR", "recipes/demo/model"):
            (folder / name).symlink_to(tiny_model)
        for name in ("held_out", "calibration", "valid", "task"):
            (folder / f"{name}.jsonl").symlink_to(text_file)
        for name in ("runs", "MMLU_DIR"):
            (folder / name).mkdir()
        for split in ("dev", "test"):
            rows = [json.dumps(row | {"split": split}) + "\n" for row in questions()]
            (folder / "MMLU_DIR" / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
        return Sandbox(folder, finished_run, small_recipe)

    return make


def questions() -> list[dict[str, object]]:
    """Six items of each of two subjects of MMLU."""
    return [
        {
            "question": f"{n} + 1?",
            "choices": ["1", "2", "3", "4"],
            "answer": n % 4,
            "subject": subject,
        }
        for subject in ("anatomy", "virology")
        for n in range(6)
    ]
