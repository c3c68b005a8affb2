"""Fixtures of the engines' tests: exports, prompts of several lengths, vLLM's interpreter."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.serving.engines import Exports
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def exports(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports of the demo model."""
    return Exports(demo_model, tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Paragraphs of this repository's own text."""
    found: list[str] = []
    for path in sorted(ROOT.glob("*.md")):
        blocks = path.read_text("utf-8").split("\n\n")
        found += [block for block in blocks if 200 < len(block) < 2000 and "|" not in block]
    return found


@pytest.fixture(scope="session")
def prompts(demo_model: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of twenty prompts, 6 to 60 tokens long."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    lengths = random.Random(0)
    return [tokenizer(text).input_ids[: lengths.randint(6, 60)] for text in texts[:20]]


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """Interpreter of the environment with vLLM."""
    if not (found := os.environ.get("FISSILE_VLLM_PYTHON")):
        pytest.skip("FISSILE_VLLM_PYTHON names no interpreter; run `make serve-test`")
    return found
