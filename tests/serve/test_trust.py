"""What is not allowed to happen quietly: changed files, forgotten threads, memory that stays."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serve.resident import half, resident_answer

from fissile.errors import CorruptCheckpoint, ResourceError, UsageError
from fissile.io.headers import open_checkpoint_headers
from fissile.serve.generate import open_store, serving
from fissile.serve.memory import HostMemory
from fissile.serve.options import Budget, ServeOptions
from fissile.serve.requests import Request

PROMPT = tuple(range(40, 70))


def damage(path: Path, offset: int, keep_times: bool) -> None:
    status = path.stat()
    with open(path, "r+b") as file:
        file.seek(offset)
        old = file.read(64)
        file.seek(offset)
        file.write(bytes(255 - byte for byte in old))
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def copied(served: Path, tmp_path: Path) -> Path:
    """A copy of the artifact that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in served.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("how", ["cut", "changed", "times put back", "unnoticed by the system"])
def test_a_file_that_changes_underneath_is_an_error(
    copied: Path, how: str, play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied / "model.safetensors"
    info = open_checkpoint_headers(copied).tensors["model.layers.5.mlp.experts.down_proj.plane_4"]
    if how == "unnoticed by the system":
        monkeypatch.setattr("fissile.serve.reader._mark", lambda _: (0, 0, 0, 0))
    options = ServeOptions(memory=half(copied, 4) // 3)

    def pick(_: int, logits: torch.Tensor) -> int:
        if how == "cut":
            os.truncate(path, info[1].begin)
        else:
            damage(path, info[1].begin, how == "times put back")
            for expert in range(1, 12):
                size = info[1].nbytes // 12
                damage(path, info[1].begin + expert * size, how == "times put back")
        return int(logits.argmax())

    with pytest.raises(CorruptCheckpoint, match=r"layer \d+, expert \d+, plane_\d: ") as caught:
        play(copied, [Request(0, PROMPT, 64)], options, pick)
    if how == "unnoticed by the system":
        assert "layer 5" in str(caught.value)
        assert "plane_4: its bytes are not those" in str(caught.value)


def test_a_file_that_is_replaced_is_not_read(
    copied: Path, served: Path, play: Callable[..., Any]
) -> None:
    path = copied / "model.safetensors"

    def pick(_: int, logits: torch.Tensor) -> int:
        other = copied / "other"
        other.write_bytes(bytes(path.stat().st_size))
        os.replace(other, path)
        return int(logits.argmax())

    options = ServeOptions(memory=half(copied, 4))
    found = play(copied, [Request(0, PROMPT, 12)], options, pick)
    assert found.tokens[0] == resident_answer(served, 4, PROMPT, 12)[0]


def test_a_file_of_another_size_is_refused_at_once(copied: Path) -> None:
    path = copied / "fissile.json"
    size = (copied / "model.safetensors").stat().st_size
    path.write_text(path.read_text().replace(f'"bytes": {size}', f'"bytes": {size + 1}'))
    with pytest.raises(CorruptCheckpoint, match=f"{size} bytes, fissile.json says otherwise"):
        open_store(copied, ServeOptions())


def state() -> tuple[set[str], int]:
    """Names of this process's reading threads, and how many files it has open."""
    names = {thread.name for thread in threading.enumerate() if "fissile" in thread.name}
    return names, len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("way", ["interrupted", "closed", "finished"])
def test_nothing_is_left_behind(served: Path, way: str) -> None:
    from fissile.serve.batching import Limits, first_come
    from fissile.serve.engine import Engine

    before = state()

    def stopped() -> None:
        with serving(served, ServeOptions(memory=half(served, 4))) as made:
            engine = Engine(*made, first_come, Limits(64, 4))
            tokens = engine.run([Request(0, PROMPT, 3 if way == "finished" else 64)])
            assert next(tokens).token is not None
            assert state()[0]
            if way == "closed":
                tokens.close()
            elif way == "finished":
                assert len(list(tokens)) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert state() == before


def test_memory_is_counted_until_nothing_refers_to_it() -> None:
    memory = HostMemory()

    def read(target: memoryview) -> int:
        target[:] = bytes(range(100))
        return 100

    buffer = memory.fill(100, read)
    view = buffer.data[10:20]
    assert memory.meter.live == memory.meter.peak == 100
    del buffer
    assert memory.meter.live == 100
    assert view.tolist() == list(range(10, 20))
    del view
    assert (memory.meter.live, memory.meter.peak) == (0, 100)


def test_pages_do_not_stay_in_the_page_cache(
    served: Path, prompt: tuple[int, ...], play: Callable[..., Any]
) -> None:
    path = served / "model.safetensors"
    segments = [
        (info.begin, info.nbytes)
        for name, (_, info) in open_checkpoint_headers(served).tensors.items()
        if ".experts." in name
    ]

    def cached() -> int:
        descriptor, found = os.open(path, os.O_RDONLY), 0
        try:
            for begin, _ in segments:
                try:
                    found += os.preadv(descriptor, [bytearray(64)], begin + 8192, os.RWF_NOWAIT)
                except BlockingIOError:
                    continue
                except OSError as err:
                    pytest.skip(f"this file system cannot say what is cached: {err}")
        finally:
            os.close(descriptor)
        return found

    def left(keep: bool) -> int:
        """Bytes in the page cache after a run that began with none."""
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        if cached():
            pytest.skip("this file system keeps its pages")
        options = ServeOptions(memory=half(served, 4), keep_pages=keep)
        play(served, [Request(0, prompt, 2)], options)
        return cached()

    kept = left(keep=True)
    assert kept > 0
    assert left(keep=False) < kept / 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (ServeOptions(memory=1000), ResourceError, "1000 bytes of memory for experts"),
        (ServeOptions(bits=6), UsageError, "bits 6: it holds 2, 3, 4"),
        (ServeOptions(budget=Budget(1.0, "bpw")), UsageError, "the base planes of all experts"),
        (ServeOptions(budget=Budget(3.0, "bpw"), bits=3), UsageError, "give one of them"),
        (ServeOptions(policy="lur"), UsageError, "lru"),
    ],
)
def test_what_cannot_be_served_is_refused(
    served: Path, options: ServeOptions, error: type[Exception], message: str
) -> None:
    before = state()
    with pytest.raises(error, match=message):
        open_store(served, options)
    assert state() == before
