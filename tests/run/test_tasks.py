"""One integer tensor, many tasks: floats trained on text, kept as a small file, put back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fissile import models
from fissile.config import Quantize, Tune
from fissile.eval.tokens import load_tokenizer
from fissile.io.manifest import check_manifest
from fissile.kernels.layout import decode_theta
from fissile.models.source import CheckpointSource, load_source

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


def test_once_for_all_finds_a_mix_within_a_budget(
    trained: Trained, task: Path, tmp_path: Path, run_cli: Cli
) -> None:
    """Low-rank zeros trained for all mixes; the artifact serves the mix that was found."""
    floats, made = tmp_path / "once.safetensors", tmp_path / "made"
    sets = ["learning_rate=0.05", "context=32", "batch_tokens=256", "rank=2", "period=4"]
    flags = ["--steps", "12", "--tokens", "1024", *[x for item in sets for x in ("--set", item)]]
    flags += ["--budget", "4bpw", "--mixes", "6"]
    words = ["--data", task, "--out", floats, "--json", *flags]
    code, text, err = run_cli("tune", trained.folder, *words)
    assert code == 0, err
    record = json.loads(text)
    for width in ("2", "4"):
        assert record["after"][width] < record["before"][width]
    assert 3 <= record["mix"]["bits"] <= 4
    assert record["mix"]["loss"] <= record["after"]["2"] + 1e-6
    assert run_cli("tune", trained.folder, "--floats", floats, "--out", made)[0] == 0
    new, old = CheckpointSource(made), CheckpointSource(trained.folder)
    assert new.nested is not None
    widths = new.nested["mixed"]
    assert widths.keys() == set(new.nested["modules"])
    assert set(widths.values()) <= {2, 4}
    # Scales and norms stay: what moved is of low rank and lies in the zeros.
    assert {name.rpartition(".")[2] for name in load_file(floats)} == {"theta_2", "theta_4"}
    for name in new.nested["modules"]:
        for k in (2, 4):
            (s_old, z_old), (s_new, z_new) = (
                decode_theta(source.parts(name)[f"theta_{k}"]) for source in (old, new)
            )
            assert torch.equal(s_old, s_new)
            moved = ((z_new - z_old) / s_old.clamp(min=1e-6)).double()
            values = torch.linalg.svdvals(moved)
            assert float(values[2:].norm()) < 0.1 * float(values.norm()) + 0.05


def test_floats_with_a_mix_are_served_with_it(trained: Trained, tmp_path: Path) -> None:
    from fissile.run.tasks import with_floats

    with safe_open(trained.floats, framework="pt") as file:
        metadata, tensors = file.metadata(), load_file(trained.floats)
    nested = CheckpointSource(trained.folder).nested
    assert nested is not None
    # Attention at 4 bits, the rest at 2.
    plan = {name: 4 if "self_attn" in name else 2 for name in nested["modules"]}
    mixed = tmp_path / "mixed.safetensors"
    save_file(tensors, mixed, metadata | {"mixed": json.dumps(plan)})
    with_floats(trained.folder, mixed, tmp_path / "made", overwrite=False)
    made = CheckpointSource(tmp_path / "made")
    narrow, wide = (CheckpointSource(trained.made, bits) for bits in (2, 4))
    for name, tensor in made.layer_state(1).items():
        expected = (wide if "self_attn" in name else narrow).layer_state(1)[name]
        assert torch.equal(tensor, expected), name
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        served = models.load(tmp_path / "made")(ids).logits
        torch.testing.assert_close(served, load_source(made)(ids).logits, rtol=0, atol=1e-4)
        assert (served - models.load(trained.made, bits=2)(ids).logits).abs().max() > 1e-3


def test_a_budget_that_nothing_fits_is_refused_before_training(
    trained: Trained, task: Path, tmp_path: Path, run_cli: Cli
) -> None:
    words = [trained.folder, "--data", task, "--out", tmp_path / "f", "--tokens", "1024"]
    code, _, err = run_cli("tune", *words, "--budget", "1bpw")
    assert code == 2
    assert "the narrowest widths take" in err
    words = [trained.folder, "--floats", trained.floats, "--out", tmp_path / "m"]
    code, _, err = run_cli("tune", *words, "--budget", "3bpw")
    assert code == 2
    assert "--budget belongs to --data" in err
