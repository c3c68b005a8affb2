"""Publishing: complete or absent, whatever happens in between."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fissile.errors import ResourceError, UsageError
from fissile.io.publish import atomic_write_bytes, atomic_write_json, published


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with published(out) as folder:
        (folder / "a").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "b").write_text("2")
        assert not out.exists()
        assert folder.name == f".out.partial-{os.getpid()}"
    assert (out / "sub" / "b").read_text() == "2"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def work() -> None:
        with published(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        work()
    assert names(tmp_path) == []


def test_existing_output_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")
    with pytest.raises(UsageError, match="already exists"), published(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_overwrite_replaces_whole_and_only_our_kind(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "stale").write_text("x")
    with published(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (out / "config.json").read_text() == "old"
    assert names(out) == ["config.json"]
    assert (out / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="not replaced"), published(home, overwrite=True):
        pytest.fail("the block must not run")
    assert (home / "thesis.txt").read_text() == "precious"


def test_failure_while_overwriting_keeps_the_old(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(RuntimeError), published(out, overwrite=True):
        raise RuntimeError
    assert (out / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_output_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    def work() -> None:
        with published(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other").write_text("theirs")

    with pytest.raises(UsageError, match="already exists"):
        work()
    assert (tmp_path / "out" / "other").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_leftovers_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        for pid in (dead_pid(), living.pid, os.getpid()):
            (tmp_path / f".out.partial-{pid}").mkdir()
        (tmp_path / ".other.partial-1").mkdir()
        with published(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
        assert names(tmp_path) == [".other.partial-1", f".out.partial-{living.pid}", "out"]
    finally:
        living.kill()
        living.wait()


def test_an_interrupted_replacement_is_undone(tmp_path: Path) -> None:
    old = tmp_path / f".out.replaced-{dead_pid()}"
    old.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(UsageError, match="already exists"), published(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_kill_leaves_no_output_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fissile.io.publish import published\n"
        "with published(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'config.json').write_text('half')\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert names(tmp_path) == [f".out.partial-{child.pid}"]
    with published(out) as folder:
        (folder / "config.json").write_text("whole")
    assert names(tmp_path) == ["out"]


def test_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=f"{tmp_path.name}: no space left"),
        published(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []
    with pytest.raises(IsADirectoryError), published(tmp_path / "out"):
        raise IsADirectoryError(errno.EISDIR, "other errors pass unchanged")


def test_a_really_full_device(tmp_path: Path) -> None:
    link = tmp_path / "full"
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    link.symlink_to("/dev/full")
    from fissile.io.publish import disk_errors

    with pytest.raises(ResourceError, match="no space left"), disk_errors(tmp_path):
        link.write_bytes(b"x" * 10_000)


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write_json(path, {"b": 1, "a": "é"})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "é"\n}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(path, {"a": float("nan")})
    atomic_write_bytes(path, b"x")
    assert path.read_bytes() == b"x"
    assert names(tmp_path) == ["a.json"]


def test_a_failed_small_write_keeps_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    atomic_write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.json"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic_write_bytes(path, b"0" * 100_000)
    script = (
        "import sys; from pathlib import Path; from fissile.io.publish import atomic_write_bytes\n"
        "for i in range(40):\n"
        "    atomic_write_bytes(Path(sys.argv[1]), bytes([48 + i % 10]) * 100_000)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(path)])
    seen = set()
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        data = path.read_bytes()
        seen.add((len(data), len(set(data))))
    assert child.wait() == 0
    assert seen == {(100_000, 1)}
