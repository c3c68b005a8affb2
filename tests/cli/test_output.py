"""What results look like: strict JSON, aligned text."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fissile.cli.main import main
from fissile.cli.output import human_bytes, jsonable, tidy


def test_json_has_no_nan_and_no_objects() -> None:
    value = {"a": float("nan"), "b": [float("-inf"), 1.5], 2: (Path("x/y"), None, True)}
    text = json.dumps(jsonable(value), allow_nan=False)
    assert text == '{"a": null, "b": [null, 1.5], "2": ["x/y", null, true]}'
    with pytest.raises(TypeError, match="set has no JSON form"):
        jsonable({"a": {1}})


def test_tidy_aligns_and_indents() -> None:
    payload = {
        "ppl": 7.123456789,
        "stored_bytes": 15_949_000,
        "by_domain": {"c": 9.5, "python": {}},
        "widths": (2, 3),
        "ok": True,
        "none": None,
        "shards": [{"file": "a", "bytes": 10}],
    }
    assert tidy(payload) == [
        "ppl           7.12346",
        "stored_bytes  15.9 MB",
        "by_domain",
        "  c       9.5",
        "  python  -",
        "widths        2, 3",
        "ok            yes",
        "none          -",
        "shards",
        "  file a  bytes 10 B",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3.2e9, "3.2 GB"), (5e15, "5000.0 TB")],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], {"warning"}),
        (["-v"], {"info", "warning"}),
        (["-vv"], {"debug", "info", "warning"}),
        (["-q"], set()),
    ],
)
def test_verbosity_filters_the_log(
    flags: list[str],
    shown: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def log(_: object) -> int:
        for level in ("debug", "info", "warning"):
            getattr(logging.getLogger("fissile.trial"), level)("%s", level)
        return 0

    monkeypatch.setattr("fissile.cli.doctor.run", log)
    assert main(["doctor", *flags]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(": ")[2] for line in lines} == shown
    assert all(line.startswith("fissile: ") for line in lines)
    assert logging.getLogger("fissile").handlers == []
