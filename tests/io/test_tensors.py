"""Reading and writing tensors: every dtype, exact bytes, exact counts, stock loaders agree."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fissile.errors import CorruptCheckpoint, ResourceError
from fissile.io.headers import read_header
from fissile.io.reader import TORCH_DTYPES, TensorReader, check_finite
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter


def planned(tensors: dict[str, Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]


def write(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int = 1 << 40) -> None:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, planned(tensors), max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    (folder / "config.json").write_text("{}")


def random_tensors() -> dict[str, Tensor]:
    """Every dtype, with random bits except where NaN would make comparison useless."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in TORCH_DTYPES.items():
        raw = torch.randint(0, 100, (6, 8), dtype=torch.uint8, generator=generator)
        if dtype == torch.bool:
            found[name] = raw % 2 == 0
        else:
            found[name] = raw.view(dtype)
    return found


def test_every_dtype_survives_and_the_stock_loader_agrees(tmp_path: Path) -> None:
    tensors = random_tensors()
    write(tmp_path, tensors)
    stock = load_file(tmp_path / "model.safetensors")
    with TensorReader(tmp_path) as reader:
        for name, tensor in tensors.items():
            mine = reader.load(name)
            assert mine.dtype == tensor.dtype
            assert torch.equal(mine.view(torch.uint8), tensor.view(torch.uint8))
            assert torch.equal(stock[name].view(torch.uint8), tensor.view(torch.uint8))


def test_stock_files_are_read_and_converted(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"t{i}": torch.randn(5, 7, generator=generator).bfloat16() for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    reader = TensorReader(tmp_path)
    assert torch.equal(reader.load("t1"), tensors["t1"])
    assert torch.equal(reader.load("t1", torch.float32), tensors["t1"].float())
    assert torch.equal(reader.load_rows("t2", 1, 4), tensors["t2"][1:4])
    assert reader.load_rows("t2", 2, 2).shape == (0, 7)
    with pytest.raises(ValueError, match=r"no rows \[4, 6\)"):
        reader.load_rows("t2", 4, 6)
    with pytest.raises(CorruptCheckpoint, match="'t9' is missing"):
        reader.load("t9")


def test_exactly_the_asked_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a": torch.ones(100), "b": torch.ones(10, 6), "c": torch.ones(50)})
    spans: list[tuple[int, int]] = []
    real = os.pread

    def spy(descriptor: int, count: int, offset: int) -> bytes:
        spans.append((offset, offset + count))
        return real(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", spy)
    reader = TensorReader(tmp_path)
    assert reader.bytes_read == 0
    reader.load("b")
    info = reader.info("b")
    assert spans == [(info.begin, info.end)]
    assert reader.bytes_read == 240
    reader.load_rows("b", 3, 5)
    assert spans[1] == (info.begin + 3 * 24, info.begin + 5 * 24)
    assert reader.bytes_read == 240 + 48


def test_threads_share_a_reader(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((400,), float(i)) for i in range(40)}
    write(tmp_path, tensors, max_shard_bytes=10_000)
    reader, wrong = TensorReader(tmp_path), []

    def work() -> None:
        for name, tensor in tensors.items():
            if not torch.equal(reader.load(name), tensor):
                wrong.append(name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert reader.bytes_read == 4 * 40 * 1600


def test_a_file_cut_after_opening_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(100)})
    reader = TensorReader(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CorruptCheckpoint, match="'a' ends early"):
        reader.load("a")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(bad: float, tmp_path: Path) -> None:
    weight = torch.ones(4, 5)
    weight[2, 3] = bad
    weight[3, 0] = bad
    write(tmp_path, {"w": weight, "ok": torch.ones(2), "codes": torch.ones(2, dtype=torch.uint8)})
    reader = TensorReader(tmp_path)
    with pytest.raises(
        CorruptCheckpoint, match=r"model.safetensors: tensor 'w' holds 2 .*\[2, 3\]"
    ):
        reader.load("w", torch.bfloat16, check=True)
    with pytest.raises(CorruptCheckpoint, match=r"holds 1 values .*\[2, 3\]"):
        reader.load_rows("w", 1, 3, check=True)
    assert torch.equal(reader.load("ok", check=True), torch.ones(2))
    check_finite("codes", reader.load("codes"))
    check_finite("w", weight[:2])


def test_shards_keep_the_order_and_the_limit(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in (3, 1, 2, 0)}
    tensors["big"] = torch.ones(100)
    tensors["last"] = torch.ones(1)
    write(tmp_path, tensors, max_shard_bytes=80)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name for p in files] == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [list(read_header(p).tensors) for p in files] == [
        ["t3", "t1"],
        ["t2", "t0"],
        ["big"],
        ["last"],
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    reader = TensorReader(tmp_path)
    assert all(torch.equal(reader.load(name), tensor) for name, tensor in tensors.items())
    joined = {k: v for p in files for k, v in load_file(p).items()}
    assert joined.keys() == tensors.keys()


def test_an_odd_tensor_does_not_make_its_neighbours_unreadable(tmp_path: Path) -> None:
    tensors = {"odd": torch.ones(3, dtype=torch.uint8), "half": torch.ones(5).half()}
    write(tmp_path, tensors)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 2
    assert torch.equal(load_file(files[1])["half"], tensors["half"])


def test_bytes_are_deterministic_and_readable_by_others(tmp_path: Path) -> None:
    tensors = random_tensors()
    old = os.umask(0o077)
    try:
        write(tmp_path / "a", tensors)
        write(tmp_path / "b", tensors)
    finally:
        os.umask(old)
    first, second = tmp_path / "a/model.safetensors", tmp_path / "b/model.safetensors"
    assert first.read_bytes() == second.read_bytes()
    assert stat.S_IMODE(first.stat().st_mode) == 0o644


def test_parts_equal_the_whole(tmp_path: Path) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    (tmp_path / "a").mkdir()
    with ShardWriter(tmp_path / "a", planned({"w": whole}), 1 << 30) as writer:
        writer.write_parts("w", (whole[i : i + 3] for i in range(0, 10, 3)))
    write(tmp_path / "b", {"w": whole.t().contiguous().t()})
    data = (tmp_path / "a/model.safetensors").read_bytes()
    assert data == (tmp_path / "b/model.safetensors").read_bytes()


MISTAKES: dict[str, tuple[Any, str]] = {
    "order": (lambda w: w.write("b", torch.ones(2)), "next planned tensor is a"),
    "shape": (lambda w: w.write("a", torch.ones(3)), r"shape \[3\], planned \[2\]"),
    "dtype": (lambda w: w.write("a", torch.ones(2).half()), "dtype torch.float16, planned F32"),
    "parts": (lambda w: w.write_parts("a", [torch.ones(1)]), "4 bytes, planned 8"),
    "nothing": (lambda w: w.close(), "a: planned but not written"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_leaving_the_plan_is_an_error(case: str, tmp_path: Path) -> None:
    action, expected = MISTAKES[case]
    plan = planned({"a": torch.ones(2), "b": torch.ones(2)})
    writer = ShardWriter(tmp_path, plan, 1 << 30)
    with pytest.raises(ValueError, match=expected):
        action(writer)


def test_plans_that_make_no_sense(tmp_path: Path) -> None:
    one = PlannedTensor("a", "F32", (1,))
    with pytest.raises(ValueError, match="twice"):
        ShardWriter(tmp_path, [one, one], 100)
    with pytest.raises(ValueError, match="unknown dtype"):
        ShardWriter(tmp_path, [PlannedTensor("a", "F4", (1,))], 100)


def test_a_full_disk_is_one_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, planned({"a": torch.ones(2)}), 100)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(ResourceError, match=f"{tmp_path.name}: no space left on device"):
        writer.write("a", torch.ones(2))
