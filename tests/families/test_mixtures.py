"""Mixtures of experts as sources, against the stock transformers classes."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fissile import families
from fissile.errors import CorruptCheckpoint, UnsupportedModel
from fissile.families.artifact import float_shapes
from fissile.models.source import CheckpointSource, load_source
from fissile.models.stream import StreamedModel
from fissile.quant.worker import EXPERT_HESSIAN_BYTES
from fissile.run.costs import COSTS

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
SMALL_EXPERTS = {"num_experts": 5, "moe_intermediate_size": 24}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 5}),
    "mixtral-windowed": ("MixtralConfig", {"num_local_experts": 5, "sliding_window": 8}),
    "qwen2_moe": ("Qwen2MoeConfig", {**SMALL_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SMALL_EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-raw": ("Qwen3MoeConfig", {**SMALL_EXPERTS, "norm_topk_prob": False}),
    "olmoe": ("OlmoeConfig", {"num_experts": 5, "tie_word_embeddings": True}),
}


@cache
def stock(case: str) -> Any:
    """A random stock model whose every tensor matters."""
    name, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = noise * 0.3 if parameter.ndim > 1 else parameter.data + noise * 0.1
    return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(case: str, tmp_path: Path) -> Path:
    stock(case).save_pretrained(tmp_path, max_shard_size="30KB")
    return tmp_path


def stacked(case: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stock model's state under canonical names; its experts are stacked in memory already."""
    found = {}
    for name, tensor in state.items():
        renamed = name.replace(".mlp.gate.", ".mlp.selector.")
        renamed = renamed.replace(".shared_expert.", ".shared.")
        found[renamed.replace(".shared_expert_gate.", ".shared_gate.")] = tensor
    if stock(case).config.tie_word_embeddings:
        del found["lm_head.weight"]
    return found


def test_every_tensor_has_its_place(case: str, folder: Path) -> None:
    """Experts stored one by one come back as the stacks that transformers makes of them."""
    assert any(".experts.4." in name for name in CheckpointSource(folder).headers.tensors)
    source = CheckpointSource(folder)
    found = source.outer_state()
    for layer in range(3):
        state = source.layer_state(layer)
        found |= {f"model.layers.{layer}.{name}": tensor for name, tensor in state.items()}
    want = stacked(case, stock(case).state_dict())
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_logits_are_those_of_the_stock_class(case: str, folder: Path) -> None:
    ids = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(7))
    source = CheckpointSource(folder)
    model = load_source(source)
    with torch.no_grad():
        want = stock(case)(ids).logits
        assert (model(ids).logits - want).abs().max() < 1e-4
        assert (StreamedModel(source).forward(ids) - want).abs().max() < 1e-4
        for layer in model.model.layers:
            # Weights of the experts matter, or the equality would say little about the router.
            selector: Any = layer.get_submodule("mlp.selector")
            selector.probabilities = None
        assert (model(ids).logits - want).abs().max() > 1e-2


def test_planned_shapes_are_those_of_the_modules(case: str, folder: Path) -> None:
    source = CheckpointSource(folder)
    shapes = dict(float_shapes(source.family, source.config.to_dict()))
    want = {n: tuple(t.shape) for n, t in stacked(case, stock(case).state_dict()).items()}
    assert shapes == want
    promised = families.promised_headers(folder, source.headers.config)
    assert {n: i.shape for n, (_, i) in promised.tensors.items()} == {
        n: i.shape for n, (_, i) in source.headers.tensors.items()
    }


def test_all_neurons_of_a_layer_are_counted(case: str, folder: Path) -> None:
    source = CheckpointSource(folder)
    dims = families.dims_of(source.family, source.headers.config)
    per_layer = sum(
        tensor.numel()
        for name, tensor in source.layer_state(0).items()
        if name.startswith(("mlp.experts", "mlp.shared."))
    )
    assert 3 * dims.hidden * dims.ffn == per_layer
    assert source.config.intermediate_size == dims.ffn


def test_a_missing_expert_is_named(case: str, tmp_path: Path) -> None:
    stock(case).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if ".layers.1." in n and ".experts.3." in n)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=name.replace(".", r"\.")):
        CheckpointSource(tmp_path)


def test_a_value_that_is_not_finite_is_found_in_its_expert(tmp_path: Path) -> None:
    stock("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.block_sparse_moe.experts.1.w3.weight"
    tensors[name][5, 6] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"experts\.1\.w3\.weight.*first at \[5, 6\]"):
        CheckpointSource(tmp_path).layer_state(2)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers: found \[0\]"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: found 2"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: found 8.0"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, there are 5 experts"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
    ],
)
def test_what_is_not_handled_is_refused(case: str, changes: dict[str, Any], message: str) -> None:
    config = stock(case).config.to_dict()
    assert families.find(config).name == case
    with pytest.raises(UnsupportedModel, match=message):
        families.find({**config, **changes})


def test_left_out_fields_take_the_stock_defaults(case: str) -> None:
    family = families.FAMILIES[case.partition("-")[0]]
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {"model_type": family.model_types[0], "num_attention_heads": 32}
    config |= {name: SIZES[name] * 64 for name in needed}
    full = transformers.AutoConfig.for_model(**config).to_dict()
    routed = families.routed_fields(family, config)
    assert routed == families.routed_fields(family, full)
    assert families.dims_of(family, config) == families.dims_of(family, full)


def test_the_plan_knows_the_rounds_of_the_solver() -> None:
    assert COSTS.expert_hessians == EXPERT_HESSIAN_BYTES


def test_config_of_either_name_is_read(tmp_path: Path) -> None:
    """transformers 5 writes the number of experts under another name than the publishers do."""
    stock("qwen3_moe").save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    path = tmp_path / "b" / "config.json"
    config = json.loads(path.read_text())
    count = config.pop("num_local_experts", None) or config.pop("num_experts")
    for name in ("num_experts", "num_local_experts"):
        path.write_text(json.dumps({**config, name: count}))
        routing = CheckpointSource(tmp_path / "b").config.routing
        assert routing is not None
        assert routing["num_experts"] == 5
