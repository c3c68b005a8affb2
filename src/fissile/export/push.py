"""Upload a folder to the Hugging Face hub: on request only, and only if it verifies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fissile.errors import QualityGate, UsageError
from fissile.export.verify import verify
from fissile.export.verify_engines import GGUF_FILE
from fissile.io.headers import checkpoint_folder
from fissile.io.hub import is_hub_id
from fissile.io.manifest import MANIFEST_FILE, read_manifest

Progress = Callable[[str, int, int, str], None]


def push(
    folder: Path,
    repo: str,
    *,
    against: Path | None = None,
    target: str = "transformers",
    bits: int | None = None,
    private: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Verify a folder, then upload exactly the files that its manifest lists.

    Args:
        folder: an artifact, its run folder, or what `fissile export` wrote.
        repo: "org/name" on the hub; made if it does not exist.
        against: see `verify`.
        target: see `verify`.
        bits: see `verify`.
        private: whether a new repository is private.
        dry_run: stop before anything is sent.
        progress: called as (stage, done, total, detail).

    Returns:
        Repository, files, bytes, and the address of the commit (None in a dry run).

    Raises:
        UsageError: no such folder, a name that is none, no manifest, or the hub refused.
        QualityGate: a check of the verification failed; nothing was sent.
    """
    if not is_hub_id(repo):
        raise UsageError(f"--repo {repo!r}: expected ORG/NAME")
    path = folder if (folder / GGUF_FILE).is_file() else checkpoint_folder(folder)
    listed = read_manifest(path)["files"]
    report = verify(path, against=against, target=target, bits=bits, progress=progress)
    if failed := [check for check in report.checks if not check.ok]:
        raise QualityGate(f"{path} is not pushed: {failed[0].name}: {failed[0].detail}")
    files = sorted([*listed, MANIFEST_FILE])
    total = sum(entry["bytes"] for entry in listed.values())
    result = {"repo": repo, "private": private, "files": files, "bytes": total, "commit": None}
    if not dry_run:
        result["commit"] = _upload(path, repo, files, private)
    return result


def _upload(path: Path, repo: str, files: list[str], private: bool) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            folder_path=path,
            repo_id=repo,
            allow_patterns=files,
            commit_message="Upload of a verified folder by fissile",
        )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as err:
        raise UsageError(f"{repo}: cannot be pushed ({' '.join(str(err).split())})") from None
    return str(commit.commit_url)
