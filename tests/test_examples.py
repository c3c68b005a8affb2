"""Every example runs as printed, and shows what it claims to show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="examples are not installed")


def output_of(name: str, *arguments: str | Path) -> str:
    words = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        name.removeprefix("test_") for name in globals() if name.startswith("test_")
    } - {"every_example_has_a_test"}


def test_training_loop() -> None:
    errors = dict(
        re.findall(r"^(\w+)\s.*relative error ([\d.]+)$", output_of("training_loop.py"), re.M)
    )
    assert float(errors["oracle"]) <= float(errors["router"]) < 0.85 * float(errors["random"])
    assert float(errors["4"]) < float(errors["3"]) < float(errors["2"]) < 0.2


def test_own_domains(demo_model: Path, tmp_path: Path) -> None:
    """The domains are those of the text, and the converted model still knows both."""
    small = [
        "calibrate.tokens=4096",
        "extract.refine_tokens=2048",
        "extract.allocation_tokens=1024",
    ]
    small += ["route.steps=10", "recover.refit_tokens=2048", "quantize.tokens=2048"]
    small += ["evaluate.tokens=1024"]
    sets = [word for item in small for word in ("--set", item)]
    out = output_of("own_domains.py", "--model", demo_model, "--out", tmp_path / "run", *sets)
    head, *lines = out.splitlines()
    assert head.split() == ["invoices", "logs"]
    rows = {
        found[1].strip(): [float(found[2]), float(found[3])]
        for line in lines
        if (found := re.match(r"(.{24})\s*([\d.]+)\s+([\d.]+)$", line))
    }
    assert {"dense", "static, refit", "pregate, refit", "nested, 2 bits", "nested, 4 bits"} <= set(
        rows
    )
    for ours, dense in zip(rows["nested, 4 bits"], rows["dense"], strict=True):
        assert ours < 2 * dense
    assert (tmp_path / "run" / "report.html").is_file()
    assert "own-domains" in (tmp_path / "run" / "recipe.yaml").read_text()


def test_nested_widths(demo_model: Path, text_file: Path, tmp_path: Path) -> None:
    """One artifact; each width holds more bytes than the last and predicts better than 2 bits."""
    words: list[str | Path] = ["--model", demo_model, "--out", tmp_path / "w", "--data", text_file]
    out = output_of("nested_widths.py", *words, "--tokens", "8192")
    rows = re.findall(r"^(\d) bits: ([\d.]+) MB in memory, ppl ([\d.]+), '", out, re.M)
    bits, held, ppl = ([float(row[i]) for row in rows] for i in range(3))
    assert bits == [2, 3, 4]
    assert held[0] < held[1] < held[2]
    assert max(ppl[1:]) < ppl[0]
    assert len(list((tmp_path / "w").glob("*.safetensors"))) == 1
