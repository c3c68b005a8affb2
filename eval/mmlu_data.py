"""Reads MMLU from local files (or, when asked, from the hub) and refuses what is incomplete.

Layouts, told apart by what is there:
cais/mmlu: rows of question, choices, answer, subject as JSONL, parquet or CSV. One file with a
    `split` column; or a file of questions with its dev file beside it (test.jsonl, dev.jsonl;
    test-00000-of-00001.parquet, dev-00000-of-00001.parquet); or a folder with such files, with a
    folder all/ of them, or with one folder of them per subject.
    Subjects are the 57, or all of them others: a set of one's own, without groups.
hendrycks: test/<subject>_test.csv and dev/<subject>_dev.csv, no header, columns question, four
    choices and the letter of the answer; in the folder itself or in data/ below it.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fissile.errors import UsageError
from fissile.eval.documents import read_rows
from fissile.eval.mmlu_prompts import LETTERS, SUBJECTS, MmluItem, Scoring
from fissile.registry import suggest

MAX_SHOTS = 5
_CHOICES = 4
_FIELDS = ("question", "choices", "answer")
_IGNORED = ("validation", "val", "train", "auxiliary_train")
"""Splits that may be there and are not read."""
HUB_NAME = "cais/mmlu"

Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class MmluData:
    """Questions and examples.

    Args:
        test: subject to its questions in file order; subjects in alphabetical order.
        dev: subject to its examples in file order.
        name: of the file, folder or data set.
    """

    test: dict[str, list[MmluItem]]
    dev: dict[str, list[MmluItem]]
    name: str

    def sha256(self) -> str:
        """Hash of what was read, whatever files held it."""
        items = [i for split in (self.test, self.dev) for own in split.values() for i in own]
        fields = [(i.subject, i.question, i.choices, i.answer) for i in items]
        sizes = {subject: len(own) for subject, own in self.test.items()}
        return hashlib.sha256(json.dumps([sizes, fields]).encode()).hexdigest()

    def check(self, shots: int, scoring: Scoring) -> None:
        """Refuse what these prompts cannot be made of.

        Raises:
            UsageError: names the subject that has too few examples, or the row without a choice.
        """
        if not 0 <= shots <= MAX_SHOTS:
            raise UsageError(f"shots {shots}: accepted are 0 to {MAX_SHOTS}")
        if scoring not in (known := get_args(Scoring)):
            raise UsageError(f"unknown scoring {scoring!r} (known: {', '.join(known)})")
        for item in (i for items in self.test.values() for i in items):
            if scoring == "continuation" and not all(item.choices):
                raise UsageError(
                    f'{item.where}: field "choices" is empty at entry {item.choices.index("")};'
                    " scoring by continuation needs a text"
                )
        for subject in self.test:
            found = len(self.dev.get(subject, []))
            if found < shots:
                raise UsageError(
                    f"{self.name}: subject {subject!r} has {found} rows in split 'dev', --shots"
                    f" {shots} needs {shots}"
                )


def read_mmlu(path: Path) -> MmluData:
    """Read a data set from files.

    Args:
        path: file or folder in one of the layouts above.

    Raises:
        UsageError: no such layout, or a row with a missing or wrong field; names file, row, field.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    parts = _hendrycks(path) or _tables(path)
    items: dict[str, list[MmluItem]] = {"test": [], "dev": []}
    for file, split in parts:
        for where, row in _read(file):
            own = row.get("split", split)
            if own in _IGNORED:
                continue
            if own not in items:
                raise UsageError(f"{where}: field \"split\" must be 'test' or 'dev', found {own!r}")
            items[own].append(_item(where, row))
    return _data(items, path.name)


def download_mmlu(name: str) -> MmluData:
    """Load a data set in the layout of cais/mmlu from the Hugging Face hub; this downloads it.

    Args:
        name: of the data set, e.g. cais/mmlu.

    Raises:
        UsageError: the package `datasets` is missing, there is no such data set, or a wrong row.
    """
    try:
        import datasets
    except ImportError:
        raise _missing("reading the hub", "datasets") from None
    items = {}
    for split in ("test", "dev"):
        try:
            rows = datasets.load_dataset(name, "all", split=split)
        except (OSError, ValueError) as err:
            reason = " ".join(str(err).split())[:200]
            raise UsageError(f"{name}: split {split!r} cannot be loaded ({reason})") from None
        items[split] = [_item(f"{name}/{split}:{n}", dict(row)) for n, row in enumerate(rows, 1)]
    return _data(items, name)


def _data(items: dict[str, list[MmluItem]], name: str) -> MmluData:
    if not items["test"]:
        raise UsageError(f"{name}: no rows in split 'test'")
    both = [*items["test"], *items["dev"]]
    if any(item.subject in SUBJECTS for item in both):
        for item in both:
            if item.subject not in SUBJECTS:
                hint = suggest(item.subject, list(SUBJECTS))
                raise UsageError(
                    f'{item.where}: field "subject" {item.subject!r} is none of the 57{hint}'
                )
    grouped = {
        split: {s: [i for i in found if i.subject == s] for s in sorted({i.subject for i in found})}
        for split, found in items.items()
    }
    return MmluData(grouped["test"], grouped["dev"], name)


def _hendrycks(path: Path) -> list[tuple[Path, str]]:
    for root in (path, path / "data"):
        files = sorted(root.glob("test/*_test.csv"))
        if files:
            return [(f, "test") for f in files] + [
                (f, "dev") for f in sorted(root.glob("dev/*_dev.csv"))
            ]
    return []


def _tables(path: Path) -> list[tuple[Path, str]]:
    """Files and the split of each one's rows."""
    if path.is_file():
        _reader(path)
        beside = _split_files(path.parent, "dev") if path.stem.startswith("test") else []
        return [(path, "test"), *((file, "dev") for file in beside if file != path)]
    roots = [path, path / "all"]
    for root in roots:
        if files := _split_files(root, "test"):
            return [(f, "test") for f in files] + [(f, "dev") for f in _split_files(root, "dev")]
    parts = [
        (file, split)
        for folder in sorted(p for p in path.iterdir() if p.name in SUBJECTS)
        for split in ("test", "dev")
        for file in _split_files(folder, split)
    ]
    if not parts:
        raise UsageError(
            f"{path}: no MMLU data; expected test.jsonl, test*.parquet or test.csv and dev files"
            " beside them, a folder per subject, or test/*_test.csv and dev/*_dev.csv"
        )
    return parts


def _split_files(folder: Path, split: str) -> list[Path]:
    """`split`.jsonl and its like; the hub's names go on with -00000-of-00001."""
    found = [p for p in sorted(folder.glob(f"{split}*")) if p.suffix in _READERS]
    found = [p for p in found if p.stem == split or p.stem.startswith(f"{split}-")]
    if len({p.suffix for p in found}) > 1:
        names = ", ".join(p.name for p in found)
        raise UsageError(f"{folder}: the split {split!r} is there more than once ({names})")
    return found


def _read(path: Path) -> Rows:
    yield from _reader(path)(path)


def _reader(path: Path) -> Callable[[Path], Rows]:
    if path.suffix not in _READERS:
        raise UsageError(f"{path}: expected a file ending in {', '.join(_READERS)}, or a folder")
    return _READERS[path.suffix]


def _jsonl(path: Path) -> Rows:
    for number, row in read_rows(path):
        yield f"{path}:{number}", row


def _csv(path: Path) -> Rows:
    """With a header, the layout of cais/mmlu; without, that of hendrycks."""
    plain = path.parent.name in ("test", "dev") and path.stem.endswith(f"_{path.parent.name}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = None if plain else [name.strip() for name in next(reader, [])]
            begin = reader.line_num + 1
            for cells in reader:
                where, begin = f"{path}:{begin}", reader.line_num + 1
                if cells:
                    yield where, _cells(where, path, header, cells)
    except OSError as err:
        raise UsageError(f"{path}: cannot be read ({err.strerror or err})") from None
    except UnicodeDecodeError as err:
        raise UsageError(f"{path}: not UTF-8 at byte {err.start}") from None
    except csv.Error as err:
        raise UsageError(f"{path}:{reader.line_num}: not CSV ({err})") from None


def _cells(where: str, path: Path, header: list[str] | None, cells: list[str]) -> dict[str, Any]:
    expected = _CHOICES + 2 if header is None else len(header)
    if len(cells) != expected:
        raise UsageError(f"{where}: expected {expected} columns, found {len(cells)}")
    if header is None:
        split = path.parent.name
        return {
            "question": cells[0],
            "choices": cells[1:-1],
            "answer": cells[-1].strip(),
            "subject": path.stem.removesuffix(f"_{split}"),
            "split": split,
        }
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    if isinstance(text := row.get("choices"), str):
        row["choices"] = _list(text)
    return row


def _list(text: str) -> Any:
    """A list as JSON or as Python prints it; anything else stays text, and is refused later."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return text


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise _missing(f"{path}: reading parquet", "pyarrow") from None
    try:
        rows: Iterable[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as err:
        raise UsageError(f"{path}: not readable parquet ({' '.join(str(err).split())})") from None
    yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _missing(what: str, package: str) -> UsageError:
    return UsageError(f"{what} needs the package {package}: pip install 'fissile[eval]'")


_READERS: dict[str, Callable[[Path], Rows]] = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}


def _item(where: str, row: dict[str, Any]) -> MmluItem:
    for name in (*_FIELDS, "subject"):
        if row.get(name) is None:
            raise UsageError(f'{where}: field "{name}" is missing')
    question, choices, subject = row["question"], row["choices"], row["subject"]
    if not (isinstance(question, str) and question.strip()):
        raise UsageError(f'{where}: field "question" must be a non-empty string')
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise UsageError(f'{where}: field "choices" must be a list of {_CHOICES} strings')
    if len(choices) != _CHOICES:
        raise UsageError(f'{where}: field "choices" has {len(choices)} entries, not {_CHOICES}')
    if not (isinstance(subject, str) and subject.strip()):
        raise UsageError(f'{where}: field "subject" must be a non-empty string, found {subject!r}')
    return MmluItem(question, tuple(choices), _answer(where, row["answer"]), subject, where)


def _answer(where: str, value: Any) -> int:
    if isinstance(value, str):
        value = LETTERS.index(value) if value in LETTERS else value
        value = int(value) if isinstance(value, str) and value in "0123" and value else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _CHOICES:
        raise UsageError(
            f'{where}: field "answer" must be 0 to {_CHOICES - 1} or A to D, found {value!r}'
        )
    return value
