"""Exports to stock classes: loaded by transformers alone, they compute what the artifact does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.converted import convert, write
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fissile import models
from fissile.config import Route
from fissile.errors import UnsupportedModel
from fissile.export.api import export, prepare
from fissile.export.classes import stock_shapes
from fissile.export.dense import lower_dense
from fissile.export.engines import ENGINES, engine_rules
from fissile.export.verify import verify
from fissile.families import FAMILIES as FAMILIES_TABLE
from fissile.io.headers import open_checkpoint_headers

TEXTS = (
    "The ferry did not cross the river for a week, and the",
    "def area(width, height):\n    return",
    "In the year of the long winter",
    "for (int i = 0; i < n; i++) {",
)
TOKEN = Route(block="token", inner_dim=24)
HEADS = Route(attention_dim=16, inner_dim=24, per_layer=True)
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "mixtral": ("mixtral", "pregate", 1, {}),
    "balance": ("mixtral", "pregate", 1, {"extra": {"selection_bias": True}}),
    "head per layer": ("mixtral", "pregate", 1, {"settings": HEADS}),
    "token": ("mixtral", "pregate", 1, {"settings": TOKEN, "extra": {"selection_bias": True}}),
    "overlap": ("mixtral", "pregate", 1, {"overlap": True}),
    "qwen2-moe": ("qwen2-moe", "pregate", 1, {"extra": {"selection_bias": True}}),
    "one of a layer": ("mixtral", "layerwise", 1, {"bias": 0.0}),
    "static": ("dense", "static", 1, {"shares": (1, 2)}),
}
PAIRED: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "glm4-moe": ("glm4-moe", "layerwise", 2, {"extra": {"selection_bias": True}}),
    "three of four": ("glm4-moe", "layerwise", 3, {}),
    "without biases": ("glm4-moe", "layerwise", 2, {"bias": 0.0}),
    "one of glm4-moe": ("glm4-moe", "layerwise", 1, {}),
}
ROUNDED: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "several in mixtral": ("mixtral", "layerwise", 2, {"bias": 0.0}),
    "several in qwen2-moe": ("qwen2-moe", "layerwise", 3, {"bias": 0.0}),
}


@pytest.fixture(scope="module")
def ids(demo_model: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    rows = [tokenizer(text * 4).input_ids[:32] for text in TEXTS]
    return torch.tensor(rows)


def both(
    dense: Path, out: Path, case: tuple[str, str, int, dict[str, Any]]
) -> tuple[Any, Any, dict[str, Any]]:
    """The artifact's model, the stock model, and the cost."""
    target, kind, top_k, options = case
    artifact = write(convert(dense, kind, top_k, **options), out / "artifact")  # type: ignore[arg-type]
    cost = export(prepare(artifact, target), out / "stock")
    stock = AutoModelForCausalLM.from_pretrained(out / "stock").eval()
    return models.load(artifact), stock, cost


@torch.no_grad()
def distance(own: Any, stock: Any, ids: Tensor) -> float:
    """Relative distance of the logits."""
    a, b = own(input_ids=ids).logits, stock(input_ids=ids).logits
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("case", CASES)
def test_stock_class_computes_the_same(
    case: str, demo_model: Path, tmp_path: Path, ids: Tensor
) -> None:
    own, stock, cost = both(demo_model, tmp_path, CASES[case])
    assert type(stock).__module__.startswith("transformers.models.")
    assert distance(own, stock, ids) < 5e-6
    assert cost["weights_exact"] is True
    stored = sum(p.numel() for p in stock.parameters())
    assert cost["parameters"] == stored
    if case in ("mixtral", "qwen2-moe"):
        settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        short = ids[:, :12]
        assert torch.equal(own.generate(short, **settings), stock.generate(short, **settings))


@torch.no_grad()
def row_distances(own: Any, stock: Any, ids: Tensor) -> Tensor:
    """Relative distance of the logits, row by row."""
    a, b = own(input_ids=ids).logits, stock(input_ids=ids).logits
    return (a - b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)


@pytest.mark.parametrize("case", PAIRED)
def test_empty_experts_decide_and_weights_are_equal(
    case: str, demo_model: Path, tmp_path: Path, ids: Tensor
) -> None:
    own, stock, cost = both(demo_model, tmp_path, PAIRED[case])
    # Short rows: where two scores are nearly equal the choice may differ, and all that follows.
    found = row_distances(own, stock, ids.reshape(-1, 8))
    assert float((found < 5e-6).float().mean()) > 0.8
    assert cost["weights_exact"] is True
    assert cost["empty_experts"] == (0 if case == "one of glm4-moe" else 4)
    if case == "one of glm4-moe":
        return
    chosen: list[Tensor] = []
    gates = [layer.mlp.gate for layer in stock.model.layers]
    hooks = [g.register_forward_hook(lambda _m, _x, out: chosen.append(out[2])) for g in gates]
    with torch.no_grad():
        stock(input_ids=ids)
    assert len(chosen) == len(gates)
    # Even places compute something; the empty experts beside them are never taken.
    assert all(bool((index % 2 == 0).all()) for index in chosen)
    assert len(torch.unique(torch.cat(chosen))) == 4
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("case", ROUNDED)
def test_equal_weights_by_small_scores(
    case: str, demo_model: Path, tmp_path: Path, ids: Tensor
) -> None:
    own, stock, cost = both(demo_model, tmp_path, ROUNDED[case])
    # Short rows: where two scores are nearly equal the choice may differ, and all that follows.
    short = ids.reshape(-1, 8)
    found = row_distances(own, stock, short)
    assert float((found < 1e-3).float().mean()) > 0.8
    assert float(found.median()) < 5e-4
    # A router scaled wrongly gives unequal weights.
    for layer in stock.model.layers:
        layer.mlp.gate.weight.data *= 2**10
    assert float(row_distances(own, stock, short).median()) > 20 * float(found.median())
    assert cost["weights_exact"] is False


FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("mixtral", "mistral", {"sliding_window": None}),
    "qwen2": ("qwen2-moe", "qwen2", {}),
    "qwen3": ("qwen3-moe", "qwen3", {"attention_bias": True}),
    "qwen3 glm": ("glm4-moe", "qwen3", {}),
    "qwen2 glm": ("glm4-moe", "qwen2", {}),
}


@pytest.mark.parametrize("case", FAMILIES)
def test_other_families(case: str, tiny_model: Path, tmp_path: Path) -> None:
    target, family, extra = FAMILIES[case]
    torch.manual_seed(len(case))
    fields = AutoConfig.from_pretrained(tiny_model).to_dict()
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {k: fields[k] for k in (*kept, "num_key_value_heads", "head_dim")}
    config = AutoConfig.for_model(
        family, vocab_size=96, max_position_embeddings=64, rms_norm_eps=1e-3, **sizes, **extra
    )
    dense = AutoModelForCausalLM.from_config(config)
    for parameter in dense.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.15 if parameter.ndim > 1 else parameter.data + noise * 0.1
    dense.save_pretrained(tmp_path / "dense")
    pregate = target != "glm4-moe"
    settings = TOKEN if family == "qwen3" else Route(attention_dim=16, inner_dim=16)
    kind, top_k = ("pregate", 1) if pregate else ("layerwise", 2)
    options = {"settings": settings, "shares": (1, 2)}
    own, stock, _ = both(tmp_path / "dense", tmp_path, (target, kind, top_k, options))
    ids = torch.randint(0, 96, (3, 40))
    assert distance(own, stock, ids) < (5e-6 if pregate else 1e-3)


def test_old_rotary_fields_become_new_ones(tiny_model: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model).to_dict()
    del config["rope_parameters"]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    config |= {"rope_theta": 5e5, "rope_scaling": scaling}
    lowered = lower_dense(FAMILIES_TABLE["llama"], config, constants=False)
    assert lowered.config["rope_parameters"] == scaling | {"rope_theta": 5e5}
    assert not {"rope_theta", "rope_scaling"} & set(lowered.config)


def test_pruned_with_biases_becomes_llama(demo_model: Path, tmp_path: Path, ids: Tensor) -> None:
    model = convert(demo_model, "static", 1, shares=(1, 3), extra={"shared_bias": True})
    generator = torch.Generator().manual_seed(1)
    model.biases = [torch.randn(256, generator=generator) * 0.1 for _ in range(6)]
    artifact = write(model, tmp_path / "artifact")
    export(prepare(artifact, "dense"), tmp_path / "stock")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert stock.config.mlp_bias is True
    assert stock.config.intermediate_size == 768
    assert distance(models.load(artifact), stock, ids) < 5e-6


@pytest.mark.parametrize("case", ["mixtral", "qwen2-moe", "glm4-moe", "static"])
def test_names_and_shapes_are_those_the_class_expects(
    case: str, tiny_model: Path, tmp_path: Path
) -> None:
    target, kind, top_k, options = (CASES | PAIRED)[case]
    artifact = write(convert(tiny_model, kind, top_k, **options), tmp_path / "artifact")  # type: ignore[arg-type]
    export(prepare(artifact, target), tmp_path / "stock", dtype="bfloat16")
    headers = open_checkpoint_headers(tmp_path / "stock")
    found = {name: info.shape for name, (_, info) in headers.tensors.items()}
    assert found == stock_shapes(headers.config)
    for engine in ("vllm", "transformers"):
        report = verify(tmp_path / "stock", target=engine)
        assert report.ok, report
        assert any("tensors" in check.name for check in report.checks)
    if case == "glm4-moe":  # the tiny model's head is tied
        headers.config["tie_word_embeddings"] = True
        broken = [rule.name for rule in engine_rules(ENGINES["vllm"], headers) if not rule.ok]
        assert broken == ["tensors", "head"]


def test_verify_starts_the_engine_and_judges_its_tokens(demo_model: Path, tmp_path: Path) -> None:
    artifact = write(convert(demo_model, "pregate", 1), tmp_path / "artifact")
    export(prepare(artifact, "mixtral"), tmp_path / "stock")
    report = verify(tmp_path / "stock", against=artifact)
    assert report.ok, report
    assert "96 of 96 tokens" in report.checks[-1].detail
    other = write(convert(demo_model, "pregate", 1, seed=5), tmp_path / "other")
    wrong = verify(tmp_path / "stock", against=other)
    assert not wrong.ok
    assert "reference's tokens" in wrong.checks[-1].name


REFUSALS: dict[str, tuple[str, str, int, dict[str, Any], str, str]] = {
    "several experts": ("mixtral", "pregate", 2, {}, "unequally", "extract.top_k=1"),
    "biases": (
        "mixtral",
        "pregate",
        1,
        {"extra": {"shared_bias": True}, "shares": (1, 2)},
        "biases",
        "recover.constants=false",
    ),
    "selector bias": ("mixtral", "layerwise", 2, {}, "no bias", "glm4-moe"),
    "pre-gated in glm": ("glm4-moe", "pregate", 1, {}, "before layer 0", "mixtral"),
    "spectral": (
        "glm4-moe",
        "layerwise",
        2,
        {"extra": {"selector": "spectral", "selector_rank": 1}},
        "spectral",
        "route.selector=ridge",
    ),
    "overlap": ("glm4-moe", "layerwise", 2, {"overlap": True}, "overlapping", "extract.top_k=1"),
    "other family": ("qwen3-moe", "pregate", 1, {}, "llama", "mixtral"),
    "routed": ("dense", "pregate", 1, {}, "chooses experts", "route.kind=static"),
    "read-me": (
        "mixtral",
        "pregate",
        1,
        {"settings": Route(block="readme", width=24, inner_dim=16)},
        "embedding table",
        "route.block=attention",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_exact_is_refused(case: str, tiny_model: Path, tmp_path: Path) -> None:
    target, kind, top_k, options, reason, way_out = REFUSALS[case]
    model = convert(tiny_model, kind, top_k, **options)  # type: ignore[arg-type]
    if "shared_bias" in options.get("extra", {}):
        model.biases = [torch.ones(64), torch.ones(64)]
    if "selector" in options.get("extra", {}):
        model.selectors = [{f"selector.{n}": torch.randn(4, 64) for n in ("gate", "up")}] * 2
    artifact = write(model, tmp_path / "artifact")
    with pytest.raises(UnsupportedModel) as caught:
        prepare(artifact, target)
    assert reason in str(caught.value)
    assert way_out in str(caught.value)


def test_float16_is_refused_and_nothing_is_written(tiny_model: Path, tmp_path: Path) -> None:
    artifact = write(convert(tiny_model, "pregate", 1), tmp_path / "artifact")
    with pytest.raises(UnsupportedModel, match="float16 is too narrow"):
        export(prepare(artifact, "mixtral"), tmp_path / "stock", dtype="float16")
    assert not (tmp_path / "stock").exists()


def test_command_line_plans_and_writes(
    run_cli: Callable[..., tuple[int, str, str]], tiny_model: Path, tmp_path: Path
) -> None:
    artifact = write(convert(tiny_model, "pregate", 1), tmp_path / "artifact")
    code, out, _ = run_cli("export", artifact, "--to", "mixtral")
    assert code == 0
    assert "extra_dimensions" in out.replace(" ", "_")
    assert run_cli("export", artifact, "--to", "mixtral", "--out", tmp_path / "x")[0] == 0
    assert (tmp_path / "x" / "README.md").read_text().count("Mixtral") >= 1
    assert run_cli("verify", tmp_path / "x", "--target", "vllm")[0] == 0
    code, _, err = run_cli("export", artifact, "--to", "dense")
    assert code == 3
    assert "route.kind=static" in err
