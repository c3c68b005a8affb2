"""One integer tensor, many tasks: floats trained on text, kept as a small file, put back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fissile import models
from fissile.config import Quantize, Tune
from fissile.eval.tokens import load_tokenizer
from fissile.io.manifest import check_manifest
from fissile.models.source import CheckpointSource

Cli = Callable[..., tuple[int, str, str]]
TEXT = json.dumps({"text": "one two three four five six seven eight nine ten " * 40})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that says the same few words again and again."""
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text("\n".join([TEXT] * 8))
    return path


@dataclass(frozen=True)
class Trained:
    """An artifact of the tiny model, floats trained on the task, the artifact with them."""

    folder: Path
    floats: Path
    made: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, text_file: Path, task: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    from fissile.run.pipeline import quantize_checkpoint
    from fissile.run.tasks import tune_task, with_floats

    out = tmp_path_factory.mktemp("task")
    settings = {"tokens": 512, "effort": "fast", "group_size": 32, "widths": [2, 4]}
    wanted = Quantize.model_validate(settings)
    quantize_checkpoint(str(tiny_model), out / "nested", quantize=wanted, data=text_file)
    tune = Tune(steps=12, context=32, batch_tokens=256, learning_rate=0.05)
    files = (out / "nested", task, out / "task.safetensors")
    record = tune_task(*files, settings=tune, tokens=1024, seed=0, progress=lambda *_: None)
    with_floats(files[0], files[2], out / "made", overwrite=False)
    return Trained(files[0], files[2], out / "made", record)


@torch.no_grad()
def nll(folder: Path, bits: int) -> float:
    """Mean loss of the task's text, with the loaded model and the tokenizer of its folder."""
    text = json.loads(TEXT)["text"]
    ids = torch.tensor(load_tokenizer(folder)(text)["input_ids"])[None, :64]
    logits = models.load(folder, bits=bits)(ids).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def test_floats_of_a_task_lower_its_loss_and_leave_the_integers(trained: Trained) -> None:
    folder, made, record = trained.folder, trained.made, trained.record
    for width in ("2", "4"):
        assert record["after"][width] < 0.99 * record["before"][width]
    weights = sum(path.stat().st_size for path in folder.glob("model*.safetensors"))
    assert trained.floats.stat().st_size < 0.5 * weights
    assert check_manifest(made) == []
    old, new, changed = CheckpointSource(folder), CheckpointSource(made), load_file(trained.floats)
    assert old.nested is not None
    for name in old.nested["modules"]:
        before, after = old.parts(name), new.parts(name)
        for suffix, part in after.items():
            if "plane" in suffix:
                assert torch.equal(part, before[suffix])
            else:
                assert torch.equal(part, changed[f"{name}.{suffix}"])
                assert not torch.equal(part, before[suffix])
    for bits in (2, 4):
        assert nll(made, bits) < 0.99 * nll(folder, bits)


def test_the_command_line_writes_the_same(
    trained: Trained, task: Path, tmp_path: Path, run_cli: Cli
) -> None:
    floats, made = tmp_path / "task.safetensors", tmp_path / "made"
    sets = ["learning_rate=0.05", "context=32", "batch_tokens=256"]
    flags = ["--steps", "12", "--tokens", "1024", *[x for item in sets for x in ("--set", item)]]
    words = ["--data", task, "--out", floats, "--json", *flags]
    code, text, err = run_cli("tune", trained.folder, *words)
    assert code == 0, err
    assert json.loads(text)["after"] == trained.record["after"]
    assert floats.read_bytes()[4096:] == trained.floats.read_bytes()[4096:]
    assert run_cli("tune", trained.folder, "--floats", floats, "--out", made)[0] == 0
    for path in made.glob("model*.safetensors"):
        assert path.read_bytes() == (trained.made / path.name).read_bytes()


def test_misuse_is_one_line(
    trained: Trained, tiny_model: Path, task: Path, tmp_path: Path, run_cli: Cli
) -> None:
    floats, out = trained.floats, tmp_path / "out"
    cases = [
        (trained.made, ["--floats", floats, "--out", out], "were trained on another artifact"),
        (trained.folder, ["--floats", task, "--out", out], "task.jsonl"),
        (tiny_model, ["--data", task, "--out", out], "no artifact with bit-nested weights"),
        (trained.folder, ["--data", task, "--out", floats], "exists; pass --overwrite"),
        (trained.folder, ["--out", out], "--data --floats is required"),
    ]
    for model, words, message in cases:
        code, _, err = run_cli("tune", model, *words)
        assert code in (2, 3, 4), (words, err)
        assert message in err
        assert err.count("\n") == 1
    assert not out.exists()
