"""lm-evaluation-harness's own MMLU tasks on local data.

Its task files are copied and told to take their rows from here instead of the hub; prompts, groups
and metrics stay as they are installed.
"""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from fissile.errors import UsageError
from fissile.eval.mmlu_data import MmluData, read_mmlu
from fissile.eval.mmlu_prompts import SUBJECTS, Scoring

_FOLDERS: dict[Scoring, tuple[str, str, str]] = {
    "letter": ("default", "_default_template_yaml", "mmlu"),
    "continuation": ("continuation", "_continuation_template_yaml", "mmlu_continuation"),
}


def write_tasks(data: Path, folder: Path, scoring: Scoring = "letter") -> str:
    """Write task definitions for `fissile eval --harness … --include-path FOLDER`.

    Args:
        data: all 57 subjects, in a layout that `read_mmlu` takes.
        folder: made if absent.
        scoring: which of the harness's two tasks.

    Returns:
        The name of the group of all subjects.

    Raises:
        UsageError: lm-eval is not installed, data that cannot be read, or a subject that is absent.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise UsageError("lm-evaluation-harness is missing: pip install 'fissile[eval]'")
    missing = set(SUBJECTS) - set(read_mmlu(data).test)
    if missing:
        raise UsageError(f"{data}: no questions in subject {min(missing)!r}")
    name, template, group = _FOLDERS[scoring]
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted((Path(found.origin).parent / "tasks" / "mmlu" / name).iterdir()):
        text = path.read_text(encoding="utf-8")
        if path.name == template:
            text += f"custom_dataset: !function {__name__}.load_subject\n"
        elif not path.name.startswith("_"):
            subject = path.stem.removeprefix("mmlu_")
            kwargs = {"data": str(data.resolve()), "subject": subject}
            text += f"\ndataset_kwargs: {json.dumps(kwargs)}\n"
        (folder / path.name).write_text(text, encoding="utf-8")
    return group


def load_subject(*, data: str, subject: str, **_: Any) -> Any:
    """The splits of one subject; called by the harness.

    Args:
        data: path of the whole set.
        subject: its name.
    """
    from datasets import Dataset, DatasetDict

    found = _read(data)
    rows = {
        split: [
            {
                "question": item.question,
                "subject": item.subject,
                "choices": list(item.choices),
                "answer": item.answer,
            }
            for item in part.get(subject, [])
        ]
        for split, part in (("test", found.test), ("dev", found.dev))
    }
    return DatasetDict({split: Dataset.from_list(own) for split, own in rows.items() if own})


@lru_cache(maxsize=1)
def _read(data: str) -> MmluData:
    # Asked for once per subject.
    return read_mmlu(Path(data))
