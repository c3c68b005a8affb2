"""Progress lines: what is written, when, and to whom."""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace

import pytest

from fissile.cli.progress import Bars, Lines, progress


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_line_per_unit_with_elapsed_and_remaining(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    show = Lines(clock)
    show("extract", 0, 4, "")
    for layer in (1, 2, 3, 4):
        clock.now += 20
        show("extract", layer, 4, f"layer {layer - 1}")
    assert capsys.readouterr().err.splitlines() == [
        "[00:00] extract 0/4",
        "[00:20] extract 1/4  layer 0  (about 01:00 left)",
        "[00:40] extract 2/4  layer 1  (about 00:40 left)",
        "[01:00] extract 3/4  layer 2  (about 00:20 left)",
        "[01:20] extract 4/4  layer 3",
    ]


def test_units_done_before_a_resume_do_not_count_as_fast(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = Clock()
    show = Lines(clock)
    clock.now += 30
    show("quantize", 5, 8, "")
    assert "(about 01:30 left)" in capsys.readouterr().err


def test_training_steps_write_at_most_a_line_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    show = Lines(clock)
    for step in range(1, 401):
        clock.now += 0.25
        show("route", step, 400, "loss 1.0")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 101
    assert lines[-1] == "[01:40] route 400/400  loss 1.0"


def test_quiet_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(Namespace(quiet=True)) as show:
        show("run", 1, 2, "x")
    assert capsys.readouterr().err == ""


def test_without_a_terminal_there_are_lines() -> None:
    with progress(Namespace(quiet=False)) as show:
        assert isinstance(show, Lines)


def test_a_terminal_gets_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    with progress(Namespace(quiet=False)) as show:
        assert isinstance(show, Bars)
        show("extract", 1, 2, "layer [0]")
        show("extract", 2, 2, "layer [1]")
    err = capsys.readouterr().err
    assert "extract" in err
    assert "2/2" in err
    assert "layer [1]" in err
    assert "\x1b[3" not in err, "NO_COLOR is set"


def test_a_closed_stderr_does_not_stop_the_work() -> None:
    code = (
        "import os\nfrom fissile.cli.progress import Lines\nshow = Lines()\n"
        "for i in range(3): show('run', i, 3, '')\nos._exit(7)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stderr=writing, check=False)
    os.close(writing)
    assert done.returncode == 7
