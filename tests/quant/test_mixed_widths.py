"""A budget on the command line: every weight gets a width, the artifact serves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.export.converted import convert, write

from fissile import models
from fissile.export.api import export, prepare
from fissile.kernels import layout
from fissile.models.source import CheckpointSource, load_source

Cli = Callable[..., tuple[int, str, str]]


def test_a_budget_is_met_and_served(
    tiny_model: Path, text_file: Path, tmp_path: Path, run_cli: Cli
) -> None:
    flags = ["--tokens", "512", "--effort", "fast", "--data", text_file, "--group-size", "32"]
    out = tmp_path / "mixed"
    code, _, err = run_cli("quantize", tiny_model, "--out", out, *flags, "--budget", "3.8bpw")
    assert code == 0, err
    nested = models.load_config(out).nested
    assert nested is not None
    widths = nested["mixed"]
    assert set(widths) == set(nested["modules"])
    assert len(set(widths.values())) > 1
    source = CheckpointSource(out)
    shapes = {
        f"model.layers.{i}.{name}": tensor.shape
        for i in range(2)
        for name, tensor in source.layer_state(i).items()
    }
    loaded = sum(layout.loaded_bytes(shapes[name], 32, bits) for name, bits in widths.items())
    weights = sum(shapes[name].numel() for name in widths)
    # Two bits with floats of groups of 32 are 3 bits a weight.
    assert 3.0 < 8 * loaded / weights <= 3.8
    for i in range(2):
        prefix = f"model.layers.{i}.mlp.shared"
        assert widths[f"{prefix}.gate_proj.weight"] == widths[f"{prefix}.up_proj.weight"]
    assert json.loads((out / "config.json").read_text())["bits"] is None
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        served = models.load(out)(ids).logits
        torch.testing.assert_close(served, load_source(source)(ids).logits, rtol=0, atol=1e-4)
        # A width that is asked for is that of every weight.
        alike = models.load(out, bits=2)(ids).logits
        same = load_source(CheckpointSource(out, bits=2))(ids).logits
        torch.testing.assert_close(alike, same, rtol=0, atol=1e-4)
        assert (served - alike).abs().max() > 1e-3
    export(prepare(out, "gguf"), tmp_path / "codes", codes=True)
    export(prepare(out, "gguf"), tmp_path / "floats")
    packed, floats = gguf_tensors(tmp_path / "codes"), gguf_tensors(tmp_path / "floats")
    assert sum(kind == "Q4_1" for kind, _ in packed.values()) == 2 * 7
    for name, (_, weight) in packed.items():
        assert (weight == floats[name][1]).all(), name


def test_experts_of_a_routed_model_get_widths_of_their_own(
    tiny_model: Path,
    text_file: Path,
    tmp_path: Path,
    run_cli: Cli,
) -> None:
    routed = write(convert(tiny_model, "pregate", 2, shares=(2,)), tmp_path / "routed")
    tensors = load_file(routed / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("experts.down_proj"):
            tensor[1] *= 4  # an expert that others are less important than
    save_file(tensors, routed / "model.safetensors", metadata={"format": "pt"})
    flags = ["--tokens", "512", "--effort", "fast", "--data", text_file, "--group-size", "32"]
    out = tmp_path / "mixed"
    code, _, err = run_cli("quantize", routed, "--out", out, *flags, "--budget", "3.4bpw")
    assert code == 0, err
    nested = models.load_config(out).nested
    assert nested is not None
    lists = {name: own for name, own in nested["mixed"].items() if isinstance(own, list)}
    assert lists
    for name, widths in lists.items():
        assert ".mlp.experts." in name
        assert widths[1] == max(widths) > min(widths)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        served = models.load(out)(ids).logits
        want = load_source(CheckpointSource(out))(ids).logits
    torch.testing.assert_close(served, want, rtol=0, atol=1e-4)
    code, text, err = run_cli("verify", out)
    assert code == 0, err
    assert "logits without fissile at the plan's widths" in text


def gguf_tensors(folder: Path) -> dict[str, tuple[str, Any]]:
    """Kind and decoded values of every tensor, as the gguf package reads them."""
    gguf = pytest.importorskip("gguf")
    return {
        t.name: (t.tensor_type.name, gguf.quants.dequantize(t.data, t.tensor_type))
        for t in gguf.GGUFReader(folder / "model.gguf").tensors
    }


def test_a_budget_that_cannot_be_met_is_refused(
    tiny_model: Path, text_file: Path, tmp_path: Path, run_cli: Cli
) -> None:
    flags = ["--tokens", "512", "--effort", "fast", "--data", text_file, "--group-size", "32"]
    out = tmp_path / "mixed"
    code, _, err = run_cli("quantize", tiny_model, "--out", out, *flags, "--budget", "1bpw")
    assert code == 2
    assert "the narrowest widths take" in err
    code, _, err = run_cli("quantize", tiny_model, "--out", out, *flags, "--budget", "much")
    assert code == 2
    assert "accepted are bits per weight (2.6bpw) or bytes (4GiB)" in err
