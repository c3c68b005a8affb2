"""Reading MMLU: every layout gives the same items; what is wrong is named with file, row, field."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fissile.errors import UsageError
from fissile.eval.mmlu_data import MmluData, download_mmlu, read_mmlu
from fissile.eval.mmlu_prompts import GROUPS, SUBJECTS, Scoring, template_sha256

Row = dict[str, Any]


def make_rows(split: str, count: int = 3) -> list[Row]:
    return [
        {
            "question": f'{split} "{number}", of\n{subject}?',
            "choices": [f"it's {number}", 'a "b"', "c, d", "1"],
            "answer": (number + len(subject)) % 4,
            "subject": subject,
        }
        for subject in ("virology", "anatomy")
        for number in range(count)
    ]


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[Row]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[Row], show: Callable[[Any], str] = json.dumps) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "subject", "choices", "answer"])
        for row in rows:
            writer.writerow([row["question"], row["subject"], show(row["choices"]), row["answer"]])


def one_file(root: Path) -> Path:
    rows = [{**r, "split": s} for s in ("dev", "test", "validation") for r in make_rows(s)]
    write_jsonl(root / "all.jsonl", rows)
    return root / "all.jsonl"


def two_files(root: Path) -> Path:
    for split in ("test", "dev"):
        write_jsonl(root / f"{split}.jsonl", make_rows(split))
    return root / "test.jsonl"


def hub_all(root: Path) -> Path:
    for split in ("test", "dev"):
        write_parquet(root / "all" / f"{split}-00000-of-00001.parquet", make_rows(split))
    return root


def hub_subjects(root: Path) -> Path:
    for split in ("test", "dev"):
        for subject in ("virology", "anatomy"):
            rows = [row for row in make_rows(split) if row["subject"] == subject]
            write_parquet(root / subject / f"{split}-00000-of-00001.parquet", rows)
    return root


def tables(root: Path) -> Path:
    write_csv(root / "test.csv", make_rows("test"))
    write_csv(root / "dev.csv", make_rows("dev"), show=repr)
    return root


def hendrycks(root: Path) -> Path:
    for split in ("test", "dev"):
        (root / "data" / split).mkdir(parents=True)
        for subject in ("virology", "anatomy"):
            path = root / "data" / split / f"{subject}_{split}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                for row in make_rows(split):
                    if row["subject"] == subject:
                        cells = [row["question"], *row["choices"], "ABCD"[row["answer"]]]
                        csv.writer(file).writerow(cells)
    return root


def contents(data: MmluData) -> dict[str, Any]:
    return {
        split: {
            subject: [(i.question, i.choices, i.answer) for i in items]
            for subject, items in part.items()
        }
        for split, part in (("test", data.test), ("dev", data.dev))
    }


@pytest.mark.parametrize("write", [two_files, hub_all, hub_subjects, tables, hendrycks, one_file])
def test_every_layout_gives_the_same_items(write: Callable[[Path], Path], tmp_path: Path) -> None:
    data = read_mmlu(write(tmp_path))
    expected = {
        split: {
            subject: [
                (r["question"], tuple(r["choices"]), r["answer"])
                for r in make_rows(split)
                if r["subject"] == subject
            ]
            for subject in ("anatomy", "virology")
        }
        for split in ("test", "dev")
    }
    assert contents(data) == expected
    (tmp_path / "again").mkdir()
    assert data.sha256() == read_mmlu(two_files(tmp_path / "again")).sha256()


def test_the_hash_follows_every_field_and_the_split(tmp_path: Path) -> None:
    hashes = set()
    changes: tuple[Row, ...] = (
        {},
        {"question": "other"},
        {"choices": ["x", 'a "b"', "c, d", "1"]},
        {"answer": 1},
        {"subject": "anatomy"},
        {"split": "dev"},
    )
    for change in changes:
        rows = make_rows("test")
        # The last row of the last subject: one split's end could be the other's beginning.
        assert rows[2]["subject"] == "virology"
        rows[2] |= change
        write_jsonl(tmp_path / "test.jsonl", rows)
        hashes.add(read_mmlu(tmp_path / "test.jsonl").sha256())
    assert len(hashes) == len(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, 'test.jsonl:2: field "question" must be a non-empty string'),
        ({"question": None}, 'test.jsonl:2: field "question" is missing'),
        ({"choices": ["a", "b", "c"]}, 'test.jsonl:2: field "choices" has 3 entries, not 4'),
        ({"choices": "abcd"}, 'test.jsonl:2: field "choices" must be a list of 4 strings'),
        ({"choices": ["a", "b", "c", 4]}, 'test.jsonl:2: field "choices" must be a list'),
        ({"answer": 4}, 'test.jsonl:2: field "answer" must be 0 to 3 or A to D, found 4'),
        ({"answer": True}, 'test.jsonl:2: field "answer" must be 0 to 3'),
        ({"answer": "E"}, 'test.jsonl:2: field "answer" must be 0 to 3'),
        ({"subject": ""}, 'test.jsonl:2: field "subject" must be a non-empty string'),
        ({"subject": "anatmy"}, r"test.jsonl:2: field .subject. 'anatmy' is none .* 'anatomy'"),
        ({"split": "tset"}, "test.jsonl:2: field .split. must be 'test' or 'dev', found 'tset'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: Row, message: str) -> None:
    rows = make_rows("test")
    rows[1] |= change
    write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(UsageError, match=message):
        read_mmlu(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    hendrycks(tmp_path)
    path = tmp_path / "data" / "test" / "anatomy_test.csv"
    path.write_text(path.read_text() + "a question,A,B\n")
    # A question of two lines counts as two: the number is the line's in the file.
    with pytest.raises(UsageError, match=r"anatomy_test.csv:7: expected 6 columns, found 3"):
        read_mmlu(tmp_path)
    path.write_bytes(b"caf\xe9,a,b,c,d,A\n")
    with pytest.raises(UsageError, match=r"anatomy_test.csv: not UTF-8 at byte 3"):
        read_mmlu(tmp_path)
    path.write_text('"a question,b\n')
    with pytest.raises(UsageError, match=r"anatomy_test.csv:\d+: not CSV"):
        read_mmlu(tmp_path)
    hub_all(tmp_path / "hub")
    path = tmp_path / "hub" / "all" / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UsageError, match=r"of-00001\.parquet: not readable parquet"):
        read_mmlu(tmp_path / "hub")


def test_what_is_incomplete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent: no such file or folder"):
        read_mmlu(tmp_path / "absent")
    with pytest.raises(UsageError, match=f"{tmp_path.name}: no MMLU data; expected"):
        read_mmlu(tmp_path)
    (tmp_path / "test.txt").touch()
    with pytest.raises(UsageError, match=r"test.txt: expected a file ending in .jsonl"):
        read_mmlu(tmp_path / "test.txt")
    data = read_mmlu(two_files(tmp_path))
    data.check(3, "letter")
    with pytest.raises(UsageError, match=r"subject 'anatomy' has 3 rows in split 'dev'.*needs 4"):
        data.check(4, "letter")
    with pytest.raises(UsageError, match="shots 6: accepted are 0 to 5"):
        data.check(6, "letter")
    rows = make_rows("test")
    rows[4]["choices"][2] = ""
    write_jsonl(tmp_path / "test.jsonl", rows)
    data = read_mmlu(tmp_path)
    data.check(0, "letter")
    with pytest.raises(UsageError, match=r'test.jsonl:5: field "choices" is empty at entry 2'):
        data.check(0, "continuation")


def test_other_subjects_are_a_set_of_ones_own(tmp_path: Path) -> None:
    rows = [{**row, "subject": "c++"} for row in make_rows("test")]
    write_jsonl(tmp_path / "items.jsonl", rows)
    assert list(read_mmlu(tmp_path / "items.jsonl").test) == ["c++"]


def test_the_hub_is_read_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: str, split: str) -> list[Row]:
        asked.append((*arguments, split))
        return make_rows(split)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data = download_mmlu("cais/mmlu")
    assert asked == [("cais/mmlu", "all", "test"), ("cais/mmlu", "all", "dev")]
    assert {s: len(items) for s, items in data.test.items()} == {"anatomy": 3, "virology": 3}
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package datasets: pip install 'fissile"):
        download_mmlu("cais/mmlu")


def test_subjects_and_templates() -> None:
    assert len(SUBJECTS) == 57
    assert {g: len(m) for g, m in GROUPS.items()} == {
        "stem": 19, "humanities": 13, "social sciences": 12, "other": 13,
    }  # fmt: skip
    ways: tuple[Scoring, ...] = ("letter", "continuation")
    assert len({template_sha256(way) for way in ways}) == 2
