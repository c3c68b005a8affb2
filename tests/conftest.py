"""Fixtures that several rooms share: the demo model, a tiny random one, labelled text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fissile

DEMO = Path(fissile.__file__).resolve().parent / "recipes" / "demo" / "model"


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the trained model that ships with the repository."""
    if not (DEMO / "model.safetensors").exists():
        pytest.skip("the demo model is not installed")
    return DEMO


@pytest.fixture(scope="session")
def tiny_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with the demo model's tokenizer; read-only."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, folder / name)
    return folder


@pytest.fixture
def copy_of_tiny(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "damaged"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of labelled text, enough for some windows of each."""
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    code = "def area(width, height):\n    return width * height\n\n"
    prose = "The river ran high that spring,\nand the ferry did not cross for a week. "
    rows = []
    for i in range(12):
        rows.append({"text": f"# file {i}\n" + code * 40, "domain": "python"})
        rows.append({"text": f"Chapter {i}. " + prose * 40, "domain": "english"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_recipe(text_file: Path) -> list[str]:
    """`--set` items that make the demo recipe run on the tiny model in seconds, every stage on."""
    items = [
        f"calibrate.data={text_file}",
        f"evaluate.data={text_file}",
        "calibrate.tokens=2048",
        "calibrate.context=64",
        "calibrate.batch_tokens=512",
        "route.steps=4",
        "route.batch_tokens=256",
        "recover.steps=2",
        "recover.batch_tokens=128",
        "recover.context=64",
        "recover.precision=float32",
        "extract.num_experts=4",
        "extract.multiple=32",
        "extract.top_k=1",
        "extract.active_share=0.5",
        "quantize.group_size=32",
        "quantize.tokens=512",
        "evaluate.tokens=600",
        "evaluate.context=64",
        "evaluate.shares=[0.5]",
        "evaluate.controls=[static, oracle]",
        "evaluate.baselines=[rtn]",
        "evaluate.choices=3",
        "limits.max_ppl_ratio=null",
    ]
    return [part for item in items for part in ("--set", item)]


@pytest.fixture(scope="session")
def finished_run(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, small_recipe: list[str]
) -> Path:
    """A run folder of the tiny model, every stage done; read-only."""
    from fissile.cli.main import main

    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["run", "demo/moe-nested", "-q", "--model", str(tiny_model), "--out", str(out)]
    assert main([*arguments, *small_recipe]) == 0
    return out


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Call the command line in this process; returns exit code, stdout, stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        from fissile.cli.main import main

        capsys.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return call
