"""Stages switched off or replaced are first-class uses: each such run ends in a good artifact."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch

from fissile import models
from fissile.eval.tokens import load_tokenizer
from fissile.models.source import CheckpointSource, load_source
from fissile.run.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]


def sets(**values: Any) -> list[str]:
    return [part for k, v in values.items() for part in ("--set", f"{k.replace('__', '.')}={v}")]


@pytest.fixture
def convert(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Cli
) -> Callable[..., Path]:
    def call(*flags: str) -> Path:
        base = ["demo/moe-nested", "-q", "--model", tiny_model, "--out", tmp_path / "out"]
        code, _, err = run_cli("run", *base, *small_recipe, *flags, "--stop-after", "export")
        assert code == 0, err
        return tmp_path / "out"

    return call


def routing_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "model" / "config.json").read_text())["routing"]


def mlp_of(model: Any, layer: int) -> Any:
    return model.model.layers[layer].mlp


def ids_of(folder: Path) -> torch.Tensor:
    ids = load_tokenizer(folder)("def area(width, height):\n    return width")["input_ids"]
    return torch.tensor([ids])


def test_layerwise_routers(convert: Callable[..., Path]) -> None:
    out = convert(*sets(route__kind="layerwise"))
    assert routing_of(out)["kind"] == "layerwise"
    model = models.load(out)
    assert model.model.router is None
    assert all(mlp_of(model, i).selector is not None for i in (0, 1))


def test_static_pruning(convert: Callable[..., Path]) -> None:
    out = convert(*sets(route__kind="static"))
    # What the routed model would compute with these sizes: 128 shared neurons and an expert of 32.
    assert routing_of(out)["shared_sizes"] == [160, 160]
    model = models.load(out)
    assert all(mlp_of(model, i).experts is None for i in (0, 1))


def test_per_layer_heads(convert: Callable[..., Path]) -> None:
    out = convert(*sets(route__per_layer="true"))
    router = models.load(out).model.router
    assert router is not None
    assert router.heads == 2


def test_readme_domain_masks(convert: Callable[..., Path]) -> None:
    """Overlapping experts, one per domain: the pool computes what masking the dense FFN would."""
    out = convert(
        *sets(extract__method="readme", quantize__enabled="false", recover__refit="false")
    )
    routing = routing_of(out)
    assert routing["layout"] == "membership"
    assert routing["num_experts"] == 2
    mlp = mlp_of(models.load(out), 1)
    assert mlp.pool is not None
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    choice = torch.arange(40)[:, None] % 2
    with torch.no_grad():
        got = mlp(x, (choice, torch.ones(40, 1)))
        want = mlp.shared(x) if mlp.shared is not None else torch.zeros_like(x)
        h = mlp.pool.neurons(x)
        for expert in (0, 1):
            mask = torch.zeros(h.shape[1])
            mask[mlp.pool.rows(expert)] = 1
            rows = choice[:, 0] == expert
            want[rows] += torch.nn.functional.linear(h * mask, mlp.pool.down_proj.weight)[rows]
    assert (got - want).abs().max() < 1e-6
    sizes = {len(mlp.pool.rows(e)) + routing["shared_sizes"][1] for e in (0, 1)}
    assert sizes == {128}


def test_readme_masks_can_be_nested(convert: Callable[..., Path]) -> None:
    out = convert(*sets(extract__method="readme", recover__method="none"))
    modules = json.loads((out / "model" / "config.json").read_text())["nested"]["modules"]
    assert "model.layers.0.mlp.pool.gate_proj.weight" in modules


def test_training_that_does_not_help_is_not_kept(
    convert: Callable[..., Path], tiny_model: Path
) -> None:
    """A learning rate that destroys the model: the ledger says so, the weights stay."""
    wild = sets(recover__learning_rate="5.0", quantize__enabled="false", export__dtype="float32")
    out = convert(*wild, *sets(recover__method="full", recover__refit="false"))
    ledger = (out / "ledger.csv").read_text()
    assert "training_rejected" in ledger
    trained = models.load(out).state_dict()
    name = "model.embed_tokens.weight"
    assert torch.equal(trained[name], load_source(CheckpointSource(tiny_model)).state_dict()[name])


def test_quantize_alone_equals_the_dense_model_closely(
    tiny_model: Path, text_file: Path, tmp_path: Path, run_cli: Cli
) -> None:
    out = tmp_path / "nested"
    flags = ["--tokens", "1024", "--group-size", "32", "--effort", "fast", "--data", text_file]
    code, text, err = run_cli("quantize", tiny_model, "--out", out, *flags, "--json")
    assert code == 0, err
    losses = json.loads(text)["relative_loss"]
    assert losses["4"] < losses["3"] < losses["2"] < 0.2
    ids = ids_of(tiny_model)
    with torch.no_grad():
        dense = load_source(CheckpointSource(tiny_model))(ids).logits.log_softmax(-1)
        gaps = []
        for bits in (2, 3, 4):
            got = models.load(out, bits=bits)(ids).logits.log_softmax(-1)
            gaps.append(float((dense.exp() * (dense - got)).sum(-1).mean()))
    assert gaps[2] < gaps[1] < gaps[0]
    assert not list(tmp_path.glob(".nested*"))
    assert run_cli("quantize", tiny_model, "--out", out, *flags)[0] == 2


def test_quantize_takes_any_key_of_its_section(
    tiny_model: Path, text_file: Path, tmp_path: Path, run_cli: Cli
) -> None:
    def run(*items: str) -> tuple[int, str, str]:
        flags = ["--tokens", "512", "--effort", "balanced", "--data", text_file, "--json", "-q"]
        sets = [part for item in ("widths=[4]", *items) for part in ("--set", item)]
        return run_cli("quantize", tiny_model, "--out", tmp_path / "nested", *flags, *sets)

    for wrong, message in (
        ("block.stepz=0", "block.stepz: unknown key; did you mean 'steps'"),
        ("generated=-1", "generated"),
        ("generated", "expected KEY=VALUE"),
    ):
        code, _, err = run(wrong)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    code, text, err = run("block.steps=0", "group_size=32", "export.dtype=float32")
    assert code == 2, err
    code, text, err = run("block.steps=0", "group_size=32")
    assert code == 0, err
    assert set(json.loads(text)["relative_loss"]) == {"4"}


def test_quantize_takes_a_routed_float_artifact(
    convert: Callable[..., Path], text_file: Path, tmp_path: Path, run_cli: Cli
) -> None:
    routed = convert(*sets(quantize__enabled="false", recover__method="none"))
    out = tmp_path / "nested"
    flags = ["--tokens", "512", "--group-size", "32", "--effort", "fast", "--data", text_file]
    code, _, err = run_cli("quantize", routed / "model", "--out", out, *flags)
    assert code == 0, err
    config = models.load_config(out)
    assert config.routing == models.load_config(routed).routing
    assert config.nested is not None
    assert "model.layers.0.mlp.experts.down_proj" in config.nested["modules"]


def test_every_domain_is_best_served_by_its_own_expert(
    demo_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Cli
) -> None:
    """Read-ME's own check: all tokens in one expert, each in turn, on a trained model."""
    code = "".join(inspect.getsource(module) for module in (argparse, difflib, textwrap))
    texts = {"python": code, "prose": "\n\n".join(topics.topics.values())}
    data, out = tmp_path / "text.jsonl", tmp_path / "out"
    rows = [
        {"text": text[first : first + 2000], "domain": domain}
        for domain, text in texts.items()
        for first in range(0, 80_000, 2000)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    items = sets(
        calibrate__data=str(data), calibrate__tokens="8192", evaluate__data=str(data),
        evaluate__tokens="2000", evaluate__shares="[0.25]", evaluate__controls="[readme]",
        evaluate__choices="0", extract__refine_rounds="0", quantize__enabled="false",
        recover__method="none", recover__refit="false", route__block="token",
    )  # fmt: skip
    status, _, err = run_cli(
        "run", "demo/moe-nested", "-q", "--model", demo_model, "--out", out, *small_recipe, *items
    )
    assert status == 0, err
    (matrix,) = read_metrics(out / "metrics.json").domain_matrices
    assert matrix.domains == ["prose", "python"]
    assert matrix.own_is_best() == [True, True]
    # By more than noise: the other domain's expert costs at least a tenth of the perplexity.
    ppl = torch.tensor(matrix.ppl)
    assert float((ppl / ppl.diagonal())[[0, 1], [1, 0]].min()) > 1.1
    assert "best served by their own" in (out / "report.html").read_text(encoding="utf-8")
