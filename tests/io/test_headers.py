"""Safetensors headers: what a stock writer makes is read, what nobody should write is refused."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fissile.errors import CorruptCheckpoint, FissileError, UnsupportedModel, UsageError
from fissile.io.headers import MAX_HEADER_BYTES, open_checkpoint_headers, read_header


def blob(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, given as bytes or as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_header_equals_what_the_stock_writer_stored(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b": torch.ones(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "pt"}
    assert {n: i.shape for n, i in header.tensors.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
    info = header.tensors["a"]
    assert raw[info.begin : info.end] == tensors["a"].numpy().tobytes()
    assert header.tensors["scalar"].dtype == "I64"
    assert header.tensors["empty"].nbytes == 0


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated: 0 bytes"),
    "seven bytes": (b"\x01" * 7, "truncated: 7 bytes"),
    "huge length": (struct.pack("<Q", 2**63) + b"{}", "at most 100000000"),
    "over 100 MB": (struct.pack("<Q", MAX_HEADER_BYTES + 1), f"{MAX_HEADER_BYTES + 1} bytes"),
    "header beyond the file": (struct.pack("<Q", 50) + b"{}", "the header ends at byte 58"),
    "not UTF-8": (blob(b'{"\xff": 1}'), "not UTF-8 at byte 10"),
    "not JSON": (blob(b"{]"), "not JSON"),
    "deeply nested": (blob(b"[" * 100_000), "not JSON"),
    "a list": (blob([]), "not a JSON object"),
    "metadata of numbers": (blob({"__metadata__": {"a": 1}}), "__metadata__"),
    "duplicate name": (
        blob(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{}}', b"1"),
        "'a' twice",
    ),
    "duplicate field": (
        blob(b'{"a":{"dtype":"U8","dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"1"),
        "'dtype' twice",
    ),
    "missing field": (blob({"a": {"dtype": "F32", "shape": [1]}}), "'a' needs exactly"),
    "entry is a number": (blob({"a": 3}), "'a' needs exactly"),
    "unknown dtype": (blob({"a": entry(0, 4, [1], "F31")}, b"1234"), "dtype 'F31'"),
    "dtype is a list": (blob({"a": entry(0, 4, [1], ["F32"])}, b"1234"), "dtype ['F32']"),
    "negative size": (blob({"a": entry(0, 4, [-1])}, b"1234"), "not a list of sizes"),
    "boolean size": (blob({"a": entry(0, 4, [True])}, b"1234"), "not a list of sizes"),
    "float size": (blob({"a": entry(0, 4, [1.0])}, b"1234"), "not a list of sizes"),
    "reversed offsets": (blob({"a": entry(4, 0, [1])}, b"1234"), "not [begin, end]"),
    "wrong byte count": (blob({"a": entry(0, 4, [2])}, b"1234"), "takes 4 bytes"),
    "overflowing shape": (blob({"a": entry(0, 0, [2**62, 4])}), "takes 0 bytes"),
    "overlap": (
        blob({"a": entry(0, 8, [2]), "b": entry(4, 8, [1])}, bytes(8)),
        "'b' overlaps",
    ),
    "hole": (blob({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "hole of 4 bytes"),
    "hole at the start": (blob({"a": entry(4, 8, [1])}, bytes(8)), "hole of 4 bytes before"),
    "truncated data": (blob({"a": entry(0, 8, [2])}, bytes(7)), "truncated at byte"),
    "trailing bytes": (blob({"a": entry(0, 4, [1])}, bytes(5)), "1 bytes after"),
    "out of range": (blob({"a": entry(0, 2**62, [2**60])}, bytes(8)), "truncated at byte"),
    "newline in a name": (blob({"a\nb": entry(0, 4, [2])}, bytes(4)), r"'a\nb'"),
    "lone surrogate": (blob(b'{"\\ud800": 1}'), r"'\ud800'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpoint) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert expected in message
    assert "\n" not in message
    message.encode()


def test_a_bit_flip_in_the_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3)}, path)
    raw = bytearray(path.read_bytes())
    raw[1] ^= 0x40
    path.write_bytes(raw)
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        read_header(path)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(UsageError, match="not a regular file"):
        read_header(tmp_path / "pipe.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards, an index and a config."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, folder / "s-1.safetensors")
    save_file({"c": torch.ones(4)}, folder / "s-2.safetensors")
    names = {"a": "s-1.safetensors", "b": "s-1.safetensors", "c": "s-2.safetensors"}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_shards_are_joined(sharded: Path) -> None:
    headers = open_checkpoint_headers(sharded)
    assert set(headers.tensors) == {"a", "b", "c"}
    assert headers.tensors["c"][0].name == "s-2.safetensors"
    assert headers.total_bytes == 4 * (2 + 3 + 4)
    assert headers.config == {"model_type": "llama"}


def test_a_run_folder_means_its_model(sharded: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    sharded.rename(run / "model")
    assert open_checkpoint_headers(run).folder == run / "model"


def _edit_index(folder: Path, **changes: str) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(changes)
    path.write_text(json.dumps(index))


def _only_bin(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


BROKEN: dict[str, tuple[Callable[[Path], Any], type[FissileError], str]] = {
    "missing shard": (
        lambda d: (d / "s-2.safetensors").unlink(),
        CorruptCheckpoint,
        r"s-2\.safetensors: missing, but named by",
    ),
    "missing tensor": (
        lambda d: _edit_index(d, e="s-2.safetensors"),
        CorruptCheckpoint,
        "'e' is missing",
    ),
    "wrong shard": (
        lambda d: _edit_index(d, a="s-2.safetensors"),
        CorruptCheckpoint,
        "'a' is missing",
    ),
    "shard outside": (
        lambda d: _edit_index(d, a="../s-1.safetensors"),
        CorruptCheckpoint,
        "no shard in this folder",
    ),
    "shard of a number": (
        lambda d: _edit_index(d, a=3),  # type: ignore[arg-type]
        CorruptCheckpoint,
        "no shard in this folder",
    ),
    "tensor twice": (
        lambda d: save_file({"a": torch.ones(2), "c": torch.ones(4)}, d / "s-2.safetensors"),
        CorruptCheckpoint,
        r"'a' is also in s-1",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), UsageError, "holds no config.json"),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        CorruptCheckpoint,
        "not a JSON object",
    ),
    "config is noise": (
        lambda d: (d / "config.json").write_bytes(b"\xff\x00"),
        CorruptCheckpoint,
        "not a JSON file",
    ),
    "index is noise": (
        lambda d: (d / "model.safetensors.index.json").write_text("{"),
        CorruptCheckpoint,
        "not a JSON file",
    ),
    "index without a map": (
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        CorruptCheckpoint,
        "weight_map",
    ),
    "shards without an index": (
        lambda d: (d / "model.safetensors.index.json").unlink(),
        CorruptCheckpoint,
        r"s-1\.safetensors without",
    ),
    "only .bin": (_only_bin, UnsupportedModel, r"pytorch_model\.bin is pickled.*save_pretrained"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case: str, sharded: Path) -> None:
    damage, error, expected = BROKEN[case]
    damage(sharded)
    with pytest.raises(error, match=expected) as caught:
        open_checkpoint_headers(sharded)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_no_folder_and_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not found"):
        open_checkpoint_headers(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no weights"):
        open_checkpoint_headers(tmp_path)
