"""What a user calls a model: a folder is taken as it is, the hub only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fissile.errors import UnsupportedModel, UsageError
from fissile.io.headers import open_checkpoint_headers
from fissile.io.hub import describe_source, has_tokenizer, resolve_source, tokenizer_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "tiny"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, path / "model.safetensors")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the download; the list receives the calls, or holds the error to raise."""
    import huggingface_hub

    calls: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        calls.append((repo, options))
        return str(options.get("revision"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_local_folders_win(folder: Path, hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_source(str(folder)) == folder
    monkeypatch.chdir(folder.parent.parent)
    assert resolve_source("models/tiny", download=True) == Path("models/tiny")
    assert hub == []


def test_nothing_is_downloaded_unasked(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="--download"):
        resolve_source("org/name")
    for path in ("./org/name", "/org/name", "name", "a/b/c", "../x", "-x/y"):
        with pytest.raises(UsageError, match=r"no such folder$"):
            resolve_source(path, download=True)
    assert hub == []


def test_download_when_asked(folder: Path, hub: list[Any]) -> None:
    assert resolve_source("org/name", download=True, revision=str(folder)) == folder
    (repo, options), *_ = hub
    assert repo == "org/name"
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in options["allow_patterns"])


def test_download_failures_are_one_line(hub: list[Any]) -> None:
    hub.append(OSError("We couldn't connect\nto the hub"))
    with pytest.raises(
        UsageError, match=r"org/name: cannot be downloaded \(We couldn't connect to"
    ):
        resolve_source("org/name", download=True)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80")
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        resolve_source(str(tmp_path))


def test_description_has_no_path_and_follows_the_contents(folder: Path, tmp_path: Path) -> None:
    first = describe_source(open_checkpoint_headers(folder))
    assert first["name"] == "tiny"
    assert first["revision"] is None
    save_file({"a": torch.ones(3)}, folder / "model.safetensors")
    second = describe_source(open_checkpoint_headers(folder))
    assert second["headers_sha256"] != first["headers_sha256"]
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    third = describe_source(open_checkpoint_headers(snapshot))
    assert (third["name"], third["revision"]) == ("org/name", "0123abc")
    assert third["headers_sha256"] == second["headers_sha256"]


def test_tokenizer_files(folder: Path) -> None:
    assert not has_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert has_tokenizer(folder)
    found = [path.name for path in tokenizer_files(folder)]
    assert found == ["tokenizer.json", "tokenizer_config.json"]
