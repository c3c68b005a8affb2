"""From what a user calls a model to a local folder; nothing is downloaded unasked."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fissile.errors import UsageError
from fissile.io.headers import CheckpointHeaders, checkpoint_folder, weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
)
_COPIED = (*TOKENIZER_FILES, "chat_template.jinja", "chat_template.json", "generation_config.json")


def resolve_source(source: str, *, download: bool = False, revision: str | None = None) -> Path:
    """Return the local checkpoint folder that `source` means.

    Args:
        source: a folder (checkpoint or run folder), or a hub id "org/name".
        download: allow fetching a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        UsageError: no such folder and no permission to download, or the download failed.
        UnsupportedModel: the folder holds pickled weights only.
        CorruptCheckpoint: the shards have no usable index.
    """
    path = Path(source).expanduser()
    if path.exists():
        folder = checkpoint_folder(path)
        weight_files(folder)
        return folder
    if not is_hub_id(source):
        raise UsageError(f"{source}: no such folder")
    if not download:
        raise UsageError(f"{source}: no such folder; if it is a hub id, add --download to fetch it")
    return _download(source, revision)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form org/name."""
    return _HUB_ID.fullmatch(name) is not None


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        # "consolidated" files repeat the weights in the vendor's own names.
        found = snapshot_download(
            source,
            revision=revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=["consolidated*", "original/*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        reason = " ".join(str(err).split())
        raise UsageError(f"{source}: cannot be downloaded ({reason})") from None
    folder = checkpoint_folder(Path(found))
    weight_files(folder)
    return folder


def describe_source(headers: CheckpointHeaders) -> dict[str, str | None]:
    """Name and revision of a checkpoint for a manifest: no absolute path, no user name.

    The revision is the hub commit when the folder is a hub snapshot; `headers_sha256` identifies
    any other folder by the names, dtypes, shapes and places of its tensors.
    """
    folder = headers.folder.resolve()
    digest = hashlib.sha256()
    for name, (path, info) in sorted(headers.tensors.items()):
        digest.update(f"{name} {path.name} {info}\n".encode(errors="backslashreplace"))
    name, revision = folder.name, None
    if folder.parent.name == "snapshots":
        revision = folder.name
        name = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return {"name": name, "revision": revision, "headers_sha256": digest.hexdigest()}


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files that a checkpoint folder holds."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def copied_files(folder: Path) -> list[Path]:
    """Files that go to an artifact byte for byte: tokenizer, templates, generation settings."""
    return [folder / name for name in _COPIED if (folder / name).is_file()]


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer that transformers can load."""
    wanted = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    return any((folder / name).is_file() for name in wanted)
