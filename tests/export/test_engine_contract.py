"""What serving engines demand of an artifact's own modeling files, checked without the engines."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.converted import convert, write
from transformers import AutoModel, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fissile.config import Recipe
from fissile.errors import CorruptCheckpoint, RecipeError
from fissile.export import targets
from fissile.export.engines import ENGINES, engine_rules
from fissile.export.verify import probe_ids, verify
from fissile.io.headers import open_checkpoint_headers
from fissile.run.plan import make_plan


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contract") / "artifact"
    return write(convert(tiny_model, "pregate", 2), out)


@pytest.fixture(scope="module")
def nested(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contract") / "nested"
    return write(convert(tiny_model, "pregate", 2), out, group=32)


def test_rules_of_the_engines_hold(artifact: Path) -> None:
    headers = open_checkpoint_headers(artifact)
    for engine in ("transformers", "vllm"):
        rules = list(engine_rules(ENGINES[engine], headers))
        assert rules
        assert all(rule.ok for rule in rules)
    report = verify(artifact, target="vllm")
    assert report.ok
    assert not verify(artifact, target="llama.cpp").ok


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"auto_map": {"AutoConfig": "x"}}, "auto_map"),
        ({"backbone": {"activation": "gelu_pytorch_tanh"}}, "activation"),
        ({"num_key_value_heads": 3}, "router's heads"),
    ],
)
def test_broken_rules_are_named(change: dict[str, Any], name: str, artifact: Path) -> None:
    headers = open_checkpoint_headers(artifact)
    headers.config.update(change)
    broken = [rule for rule in engine_rules(ENGINES["vllm"], headers) if not rule.ok]
    assert [rule.name for rule in broken] == [name]


def test_quantized_experts_keep_their_activation(nested: Path) -> None:
    headers = open_checkpoint_headers(nested)
    headers.config["backbone"] = {**headers.config["backbone"], "activation": "gelu"}
    assert all(rule.ok for rule in engine_rules(ENGINES["vllm"], headers))


def test_modules_are_what_fused_kernels_replace(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True)
    for layer in model.model.layers:
        shapes = {name: p.ndim for name, p in layer.mlp.experts.named_parameters()}
        assert shapes == {"gate_up_proj": 3, "down_proj": 3}
    paths = [name for name, m in model.named_modules() if hasattr(m, "layer_idx")]
    numbers = [re.findall(r"\.(\d+)", f".{path}") for path in paths]
    assert all(len(found) == 1 for found in numbers)
    assert len({found[0] for found in numbers}) == len(paths) == 3
    assert type(AutoModel.from_pretrained(artifact, trust_remote_code=True)).__name__ == (
        "FissileModel"
    )


def test_the_router_calls_the_attention_interface_once(artifact: Path) -> None:
    tree = ast.parse((artifact / "routers_fissile.py").read_text())
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "get_interface"
    ]
    assert len(calls) == 1


def test_experts_implementations_agree(artifact: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True).eval()
    ids = probe_ids(8192)
    found = []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
    assert float(found[0].std()) > 0.1
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=1e-4, atol=1e-4)


def damaged(folder: Path, out: Path, **change: Any) -> Path:
    copy = Path(shutil.copytree(folder, out))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    return copy


def test_an_unknown_quantization_never_loads_random_weights(nested: Path, tmp_path: Path) -> None:
    from fissile import models

    fields = json.loads((nested / "config.json").read_text())
    layout = damaged(nested, tmp_path / "layout", nested=fields["nested"] | {"layout": 99})
    with pytest.raises(ValueError, match=r"layout is 99"):
        AutoModelForCausalLM.from_pretrained(layout, trust_remote_code=True)
    floats = damaged(nested, tmp_path / "floats", nested=None, bits=None)
    with pytest.raises(ValueError, match="missing_keys"):
        AutoModelForCausalLM.from_pretrained(floats, trust_remote_code=True)
    with pytest.raises(CorruptCheckpoint):
        models.load(floats)


def test_targets_of_recipes_are_those_of_the_command() -> None:
    field = Recipe.model_fields["export"].annotation
    assert field is not None
    accepted = field.model_json_schema()["properties"]["targets"]["items"]["enum"]
    assert tuple(accepted) == targets.TARGETS


PLANS: dict[str, tuple[dict[str, Any], str, str]] = {
    "several": ({"top_k": 2}, "mixtral", "extract.top_k=1"),
    "constants": ({"recover": {}}, "mixtral", "recover.constants=false"),
    "dynamic": ({"route": {"kind": "layerwise", "dynamic_k": True}}, "glm4-moe", "dynamic_k"),
    "ridge": ({"route": {"kind": "layerwise"}}, "mixtral", "glm4-moe"),
    "trained": (
        {"route": {"kind": "layerwise", "selector": "mean_gate"}, "recover": {"constants": False}},
        "mixtral",
        "recover.train_router=false",
    ),
    "servers": ({}, "gptq", "float weights only"),
    "llama.cpp": ({"top_k": 2}, "gguf", "extract.top_k=1"),
    "routed": ({}, "dense", "route.kind=static"),
}


def recipe_of(change: dict[str, Any], target: str) -> Recipe:
    return Recipe.model_validate(
        {
            "extract": {
                "num_experts": 4,
                "multiple": 32,
                "active_share": 0.5,
                "top_k": change.get("top_k", 1),
            },
            "route": change.get("route", {}),
            "recover": change.get("recover", {"constants": False}),
            "export": {"targets": [target]},
            "evaluate": {"controls": [], "shares": [0.5]},
        }
    )


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_refuses_what_cannot_be_exported(case: str, tiny_model: Path) -> None:
    change, target, way_out = PLANS[case]
    with pytest.raises(RecipeError, match=re.escape(way_out)):
        make_plan(recipe_of(change, target), tiny_model)


@pytest.mark.parametrize("target", ["mixtral", "qwen2-moe", "gguf"])
def test_the_plan_refuses_gelu_where_engines_fuse_silu(target: str, copy_of_tiny: Path) -> None:
    path = copy_of_tiny / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "gelu"}))
    with pytest.raises(RecipeError, match=r"experts with gelu would run with silu.*trust_remote"):
        make_plan(recipe_of({}, target), copy_of_tiny)


@pytest.mark.parametrize("target", ["mixtral", "qwen2-moe", "gguf"])
def test_the_plan_accepts_what_can_be(target: str, tiny_model: Path) -> None:
    assert make_plan(recipe_of({}, target), tiny_model).sizes.stored > 0


def test_a_run_without_constants_exports(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Any
) -> None:
    out = tmp_path / "run"
    changes = ["recover.constants=false", "quantize.enabled=false", "export.dtype=float32"]
    words = [part for item in changes for part in ("--set", item)]
    code, _, err = run_cli(
        *("run", "demo/moe-nested", "-q", "--model", tiny_model, "--out", out),
        *(*small_recipe, *words, "--set", "export.targets=[mixtral]"),
        *("--stop-after", "export"),
    )
    assert code == 0, err
    metrics = json.loads((out / "journal" / "recover.json").read_text())
    assert any(kind == "full" for _, _, kind in metrics["refit"])
    stock = tmp_path / "stock"
    assert run_cli("export", out, "--to", "mixtral", "--out", stock)[0] == 0
    assert verify(stock, against=out).ok


def test_a_layerwise_run_of_qwen3_becomes_qwen3_moe(
    tiny_model: Path, tmp_path: Path, small_recipe: list[str], run_cli: Any
) -> None:
    """Two experts a token, chosen by linear routers without biases, with norms over heads."""
    source = tmp_path / "qwen3"
    torch.manual_seed(1)
    fields = json.loads((tiny_model / "config.json").read_text())
    kept = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "mlp_bias")}
    Qwen3ForCausalLM(Qwen3Config(**kept)).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_model / name, source / name)
    changes = ["recover.constants=false", "quantize.enabled=false", "export.dtype=float32"]
    changes += ["route.kind=layerwise", "route.selector=mean_gate", "extract.top_k=2"]
    changes += ["recover.train_router=false"]
    words = [part for item in changes for part in ("--set", item)]
    out, stock = tmp_path / "run", tmp_path / "stock"
    code, _, err = run_cli(
        *("run", "demo/moe-nested", "-q", "--model", source, "--out", out),
        *(*small_recipe, *words, "--set", "export.targets=[qwen3-moe]"),
        *("--stop-after", "export"),
    )
    assert code == 0, err
    assert run_cli("export", out, "--to", "qwen3-moe", "--out", stock)[0] == 0
    report = verify(stock, against=out)
    assert report.ok, report
    assert "tokens are the reference's" in report.checks[-1].detail
