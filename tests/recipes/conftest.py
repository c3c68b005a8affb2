"""Tiny random models of the architectures that recipes are for, from the published configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fissile.recipe_files import PUBLISHED, published_config, recipe_folder, shipped_recipes

RECIPES = {
    name: path for name, path in shipped_recipes().items() if (path.parent / PUBLISHED).is_file()
}
"""Recipes for a published model."""

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def shrunk(published: dict[str, Any]) -> dict[str, Any]:
    """The same architecture with small sizes: ratios of heads, ties, norms and rotary kinds stay.

    Args:
        published: config.json as the publisher states it.
    """
    # One layer of each kind.
    layers = 2 if "sliding_window_pattern" in published else 1
    tiny = published | TOKENS | {"vocab_size": 8192, "num_hidden_layers": layers}
    heads, kv_heads = published["num_attention_heads"], published["num_key_value_heads"]
    ratio = heads // kv_heads
    count = ratio * max(1, 4 // ratio) if heads > kv_heads else 4
    tiny |= {"num_attention_heads": count, "num_key_value_heads": count // ratio}
    width = published.get("head_dim") or published["hidden_size"] // heads
    square = width * heads == published["hidden_size"]
    # Inputs of every linear are a multiple of 32, the smallest group of integers.
    size = next(d for d in (16, 32) if count * d % 32 == 0)
    tiny["hidden_size"] = count * size if square else 64
    if published.get("head_dim"):
        tiny["head_dim"] = size if square else 32
    tiny |= {"intermediate_size": 320, "max_position_embeddings": 128}
    if "moe_intermediate_size" in published:
        tiny["moe_intermediate_size"] = 32
    for name in ("num_experts", "num_local_experts"):
        if name in published:
            tiny |= {name: 6, "num_experts_per_tok": 2}
            tiny["intermediate_size"] = 64
    if published.get("sliding_window"):
        tiny["sliding_window"] = 16
    if "sliding_window_pattern" in published:
        tiny["sliding_window_pattern"] = 2
    return tiny | _rope(published, tiny)


def _rope(published: dict[str, Any], tiny: dict[str, Any]) -> dict[str, Any]:
    """Rotary scaling whose original length lies below the contexts of the tests."""
    scaling = published.get("rope_scaling")
    if not scaling:
        return {}
    found, scaling = {}, dict(scaling)
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = 32
    if "long_factor" in scaling:
        found["original_max_position_embeddings"] = 32
        head = tiny["hidden_size"] // tiny["num_attention_heads"]
        count = int(head * published.get("partial_rotary_factor", 1)) // 2
        for name in ("long_factor", "short_factor"):
            step = len(scaling[name]) // count
            scaling[name] = [float(x) for x in scaling[name][::step][:count]]
    return {**found, "rope_scaling": scaling}


def stock_model(folder: str) -> Any:
    """A random stock model of a recipe folder's architecture whose every tensor matters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    published = published_config(recipe_folder() / folder / "any.yaml")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shrunk(published))).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.15 if parameter.ndim > 1 else parameter.data + noise * 0.1
    return model.to(torch.bfloat16)


@pytest.fixture(scope="session")
def tiny(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a recipe ("llama/3.2-1b/moe") to the tiny model it runs on; read-only."""

    @cache
    def saved(folder: str) -> Path:
        out = tmp_path_factory.mktemp("model")
        published = json.loads((recipe_folder() / folder / PUBLISHED).read_text())
        stock_model(folder).save_pretrained(out)
        # As its publisher wrote it, not as this version of transformers does.
        (out / "config.json").write_text(json.dumps(shrunk(published)))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(demo_model / name, out / name)
        return out

    return lambda name: saved(name.rpartition("/")[0])
