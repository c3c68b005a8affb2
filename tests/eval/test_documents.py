"""Reading JSONL: what is accepted, and that every refusal names file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from fissile.errors import UsageError
from fissile.eval.documents import (
    Document,
    by_domain,
    read_documents,
    rows_to_bytes,
    sha256_files,
)


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(content, encoding="utf-8")
    return path


def test_reads_text_and_domain_and_skips_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a b", "domain": "x"}\n\n{"text": "ü\\n", "other": 1}\n')
    assert read_documents(path) == [Document("a b", "x", 1), Document("ü\n", "text", 3)]


def test_rows_survive_a_round_trip(tmp_path: Path) -> None:
    rows = [{"text": "line\u2028separator \x85 and \n newline", "domain": "d"}]
    path = tmp_path / "text.jsonl"
    path.write_bytes(rows_to_bytes(rows))
    assert [d.text for d in read_documents(path)] == [rows[0]["text"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ""}\n', r':2: field "text" is empty'),
        ('{"text": "  \\n"}\n', r':1: field "text" is empty'),
        ('{"txt": "a"}\n', r':1: field "text" must be a string, found nothing'),
        ('{"text": 3}\n', r':1: field "text" must be a string, found int'),
        ('{"text": "a", "domain": 3}\n', r':1: field "domain" must be'),
        ('{"text": "a"}\n{"text": "a"\n', r":2: not JSON"),
        ('["a"]\n', r":1: expected an object, found list"),
        ("", r"no documents"),
        ("\n\n", r"no documents"),
    ],
)
def test_refuses_with_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UsageError, match=message) as caught:
        read_documents(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_absent_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_documents(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_documents(tmp_path / "binary.jsonl")


def test_domains_are_sorted_and_complete() -> None:
    documents = [Document("1", "z"), Document("2", "a"), Document("3", "z")]
    assert list(by_domain(documents).items()) == [("a", [1]), ("z", [0, 2])]


def test_hash_depends_on_names_and_bytes_not_on_the_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_bytes(b"1")
        (tmp_path / folder / "b").write_bytes(b"2")
    one = [tmp_path / "one" / name for name in "ab"]
    two = [tmp_path / "two" / name for name in "ba"]
    assert sha256_files(one) == sha256_files(two)
    (tmp_path / "two" / "b").write_bytes(b"3")
    assert sha256_files(one) != sha256_files(two)
    assert sha256_files(one[:1]) != sha256_files(one)
