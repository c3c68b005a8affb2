"""Uploads: only what verified, only what the manifest lists, nothing in a dry run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from tests.export.converted import convert, write

from fissile.errors import UsageError
from fissile.export.push import push


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(convert(tiny_model, "static", 1), tmp_path_factory.mktemp("push") / "artifact")


class Hub:
    """Stands in for the hub's client; remembers what it was asked."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self) -> None:
        self.calls = []

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> Any:
        self.calls.append(("upload", options))
        return SimpleNamespace(commit_url="commit")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def test_what_verified_is_uploaded_and_nothing_else(artifact: Path, hub: Hub) -> None:
    result = push(artifact, "org/name")
    (first, made), (second, sent) = hub.calls
    assert (first, second) == ("create", "upload")
    assert (made["repo"], made["private"]) == ("org/name", True)
    listed = json.loads((artifact / "fissile.json").read_text())["files"]
    assert set(sent["allow_patterns"]) == {*listed, "fissile.json"}
    assert result["commit"] == "commit"
    assert result["bytes"] == sum((artifact / name).stat().st_size for name in listed)


def test_a_dry_run_sends_nothing(artifact: Path, hub: Hub, run_cli: Any) -> None:
    code, out, _ = run_cli("push", artifact, "--repo", "org/name", "--dry-run", "--json")
    assert code == 0
    assert "model.safetensors" in " ".join(json.loads(out)["files"])
    assert hub.calls == []


@pytest.mark.parametrize("damage", ["changed", "added"])
def test_what_does_not_verify_stays(
    damage: str, artifact: Path, tmp_path: Path, hub: Hub, run_cli: Any
) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    if damage == "changed":
        (copy / "README.md").write_text("other")
    else:
        (copy / "token.txt").write_text("secret")
    code, _, err = run_cli("push", copy, "--repo", "org/name")
    assert code == 5
    assert "is not pushed" in err
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["name", "a/b/c", "../x", ""])
def test_a_name_that_is_none_is_refused(repo: str, artifact: Path, hub: Hub) -> None:
    with pytest.raises(UsageError, match="ORG/NAME"):
        push(artifact, repo)
    assert hub.calls == []


def test_a_refusal_of_the_hub_is_one_line(
    artifact: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise OSError("no\nroute")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(UsageError, match="cannot be pushed \\(no route\\)"):
        push(artifact, "org/name")
