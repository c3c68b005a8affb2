"""What can be wrong with inputs: one clear line, the right exit code, and nothing lost."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Cli = Callable[..., tuple[int, str, str]]
WEIGHTS = "model.safetensors"


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}".encode() + path.read_bytes())
    return digest.hexdigest()


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) * 2 // 3])


def flip_header_bit(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    place = data.index(b'"shape":[') + len(b'"shape":[')
    data[place] ^= 1
    (folder / WEIGHTS).write_bytes(data)


def edit(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


UP = "model.layers.1.mlp.up_proj.weight"


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP]


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP] = tensors[UP][:-1].contiguous()


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP][3, 5] = float("nan")


def other_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (truncate, 3, [WEIGHTS]),
        (flip_header_bit, 3, [WEIGHTS]),
        (edit(drop), 3, [UP]),
        (edit(reshape), 3, [UP, "255"]),
        (edit(poison), 3, [UP, "NaN"]),
        (other_family, 3, ["mamba", "llama"]),
        (pickled, 3, ["pytorch_model.bin", "safetensors"]),
    ],
)
def test_damaged_checkpoints(
    damage: Callable[[Path], None],
    code: int,
    words: list[str],
    copy_of_tiny: Path,
    tmp_path: Path,
    small_recipe: list[str],
    run_cli: Cli,
) -> None:
    damage(copy_of_tiny)
    before = tree_hash(copy_of_tiny)
    out = tmp_path / "out"
    got, _, err = run_cli(
        "run", "demo/moe-nested", "-q", "--model", copy_of_tiny, "--out", out, *small_recipe
    )
    assert got == code
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("fissile: error: ")
    assert [w for w in words if w not in err] == []
    assert tree_hash(copy_of_tiny) == before
    assert not (out / "model").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--set", "quantize.groupsize=64"], 2, ["groupsize", "group_size"]),
        (["--set", "quantize.widths=[2,5]"], 2, ["quantize.widths.1", "2, 3, 4, 6 or 8"]),
        (["--set", "extract.active_share=1.0"], 2, ["active_share"]),
        (["--set", "calibrate.tokens=100"], 2, ["calibration tokens"]),
        (["--set", "calibrate.tokens=400000"], 2, ["fill", "windows"]),
        (["--stop-after", "rout"], 2, ["route"]),
    ],
)
def test_wrong_requests(
    flags: list[str],
    code: int,
    words: list[str],
    tiny_model: Path,
    tmp_path: Path,
    small_recipe: list[str],
    run_cli: Cli,
) -> None:
    arguments = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", tmp_path / "out"]
    got, _, err = run_cli("run", *arguments, *small_recipe, *flags)
    assert got == code
    assert len(err.strip().splitlines()) == 1
    assert [w for w in words if w not in err] == []


def test_empty_calibration_text(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Cli
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    arguments = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", tmp_path / "out"]
    got, _, err = run_cli("run", *arguments, *small_recipe, "--set", f"calibrate.data={empty}")
    assert got == 2
    assert "empty" in err


def test_a_refused_run_is_begun_anew_without_a_flag(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Cli
) -> None:
    """Settings that only the text shows to be wrong leave nothing that a new run would lose."""
    words = ["run", "demo/moe-nested", "-q", "--model", tiny_model, "--out", tmp_path / "out"]
    words += [*small_recipe, "--stop-after", "calibrate"]
    got, _, err = run_cli(*words, "--set", "calibrate.tokens=8")
    assert (got, "calibration tokens make" in err) == (2, True)
    assert run_cli(*words)[0] == 0
    journal = tmp_path / "out" / "journal"
    assert json.loads((journal / "run.json").read_text())["recipe.calibrate.tokens"] != 8
    got, _, err = run_cli(*words, "--set", "seed=5")
    assert (got, "--resume" in err) == (2, True)


def test_an_existing_output_is_left_alone(
    finished_run: Path, tiny_model: Path, small_recipe: list[str], run_cli: Cli
) -> None:
    before = tree_hash(finished_run)
    arguments = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", finished_run]
    got, _, err = run_cli("run", *arguments, *small_recipe)
    assert got == 2
    assert "--resume" in err
    got, _, err = run_cli("run", *arguments, *small_recipe, "--resume", "--set", "seed=5")
    assert got == 2
    assert "recipe.seed was 0 and is 5" in err
    assert tree_hash(finished_run) == before


def test_overwrite_refuses_folders_that_are_no_runs(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Cli
) -> None:
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.txt").write_text("years of work")
    arguments = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", precious, "--overwrite"]
    got, _, err = run_cli("run", *arguments, *small_recipe)
    assert got == 2
    assert "not a run folder" in err
    assert (precious / "chapter.txt").read_text() == "years of work"


def test_bits_that_are_not_stored(finished_run: Path, text_file: Path, run_cli: Cli) -> None:
    got, _, err = run_cli(
        "eval", finished_run, "--task", "perplexity", "--data", text_file, "--bits", "5"
    )
    assert got == 2
    assert "2, 3, 4" in err
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="bits=5: this model serves 2, 3, 4"):
        AutoModelForCausalLM.from_pretrained(finished_run / "model", trust_remote_code=True, bits=5)


def test_a_flipped_bit_in_an_artifact_is_found(
    finished_run: Path, tmp_path: Path, run_cli: Cli
) -> None:
    import shutil

    copy = Path(shutil.copytree(finished_run / "model", tmp_path / "copy"))
    assert run_cli("verify", copy)[0] == 0
    data = bytearray((copy / WEIGHTS).read_bytes())
    data[-1000] ^= 4
    (copy / WEIGHTS).write_bytes(data)
    got, _, err = run_cli("verify", copy)
    assert got == 5
    assert WEIGHTS in err


def test_a_missing_tensor_never_loads_as_random_weights(finished_run: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoModelForCausalLM

    copy = Path(shutil.copytree(finished_run / "model", tmp_path / "copy"))
    tensors = load_file(copy / WEIGHTS)
    del tensors["model.layers.0.self_attn.q_proj.weight.plane_2"]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys: .*q_proj\.weight\.plane_2"):
        AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True, bits=2)


def test_a_full_disk(
    tiny_model: Path,
    tmp_path: Path,
    small_recipe: list[str],
    run_cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk fills up in the middle: exit code 4, and after making room the run continues."""
    import os

    out, real, budget = tmp_path / "out", os.fsync, [14]

    def fsync(descriptor: int) -> None:
        budget[0] -= 1
        if budget[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    arguments: list[Any] = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", out]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        got, _, err = run_cli("run", *arguments, *small_recipe)
    assert got == 4
    assert "disk" in err.lower() or "space" in err.lower()
    assert not (out / "model").exists()
    assert run_cli("run", *arguments, *small_recipe, "--resume")[0] == 0
