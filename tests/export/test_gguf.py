"""GGUF files, read back by the gguf package and, where it is at hand, run by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.export.converted import convert, plan_of, with_plan, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from fissile.errors import UnsupportedModel
from fissile.export.api import export, prepare
from fissile.export.engine_run import available
from fissile.export.gguf_file import _rope_factors
from fissile.export.gguf_names import gguf_problems
from fissile.export.gguf_tokenizer import tokenizer_metadata
from fissile.export.verify import verify

gguf = pytest.importorskip("gguf")
LLAMA = pytest.mark.skipif(available("llama.cpp") is not None, reason="llama.cpp is not here")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a file; tensors decoded by the gguf package."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1])
        for t in reader.tensors
    }
    return fields, tensors


def kinds(folder: Path) -> dict[str, str]:
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {t.name: t.tensor_type.name for t in reader.tensors}


def pairs(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama.cpp rotates them: halves of every head interleaved, one row at a time."""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(size // 2):
            rows += [weight[head * size + i], weight[head * size + size // 2 + i]]
    return np.stack(rows)


def test_mixtral_as_float32_holds_the_stock_weights(tiny_model: Path, tmp_path: Path) -> None:
    artifact = write(convert(tiny_model, "pregate", 1), tmp_path / "artifact")
    export(prepare(artifact, "mixtral"), tmp_path / "stock")
    export(prepare(artifact, "gguf"), tmp_path / "gguf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    state = {name: tensor.numpy() for name, tensor in stock.state_dict().items()}
    fields, tensors = read(tmp_path / "gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["llama.expert_used_count"] == 1
    assert fields["llama.embedding_length"] == stock.config.hidden_size
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"]
    assert epsilon == pytest.approx(stock.config.rms_norm_eps, rel=1e-6)
    layer, block = "model.layers.1", "blk.1"
    query = state[f"{layer}.self_attn.q_proj.weight"]
    assert (tensors[f"{block}.attn_q.weight"] == pairs(query, 4)).all()
    key = state[f"{layer}.self_attn.k_proj.weight"]
    assert (tensors[f"{block}.attn_k.weight"] == pairs(key, 2)).all()
    both = state[f"{layer}.mlp.experts.gate_up_proj"]
    gate, up = np.split(both, 2, axis=1)
    assert (tensors[f"{block}.ffn_gate_exps.weight"] == gate).all()
    assert (tensors[f"{block}.ffn_up_exps.weight"] == up).all()
    assert (tensors["token_embd.weight"] == state["model.embed_tokens.weight"]).all()
    assert set(kinds(tmp_path / "gguf").values()) == {"F32"}


@pytest.mark.parametrize("group", [32, 64])
def test_q4_1_decodes_to_our_weights_bit_for_bit(
    group: int, demo_model: Path, tmp_path: Path
) -> None:
    artifact = write(convert(demo_model, "pregate", 1), tmp_path / "artifact", group=group)
    prepared = prepare(artifact, "gguf")
    cost = export(prepared, tmp_path / "codes", codes=True)
    export(prepare(artifact, "gguf"), tmp_path / "floats")
    _, codes = read(tmp_path / "codes")
    _, floats = read(tmp_path / "floats")
    found = kinds(tmp_path / "codes")
    packed = {name for name, kind in found.items() if kind == "Q4_1"}
    # Attention and experts of the six layers; the router's layer and everything else are floats.
    assert len(packed) == 6 * 7
    assert not [name for name in packed if name.startswith("blk.0.")]
    for name, weight in codes.items():
        assert (weight == floats[name]).all(), name
    assert len(np.unique(codes["blk.1.ffn_down_exps.weight"][0, 0, :32])) > 2
    assert cost["bytes"] < 0.5 * sum(w.nbytes for w in floats.values())


def test_q4_1_holds_experts_of_several_widths(tiny_model: Path, tmp_path: Path) -> None:
    plain = write(convert(tiny_model, "pregate", 1), tmp_path / "plain", group=32, widths=(2, 3, 4))
    mixed = plan_of(plain, lambda layer: [[4, 2, 3, 2], [2, 3, 2, 2]][layer])
    artifact = with_plan(tmp_path / "planned", plain, mixed)
    export(prepare(artifact, "gguf"), tmp_path / "codes", codes=True)
    export(prepare(artifact, "gguf"), tmp_path / "floats")
    _, codes = read(tmp_path / "codes")
    _, floats = read(tmp_path / "floats")
    found = kinds(tmp_path / "codes")
    assert found["blk.1.ffn_down_exps.weight"] == "Q4_1"
    for name, weight in codes.items():
        assert (weight == floats[name]).all(), name


def test_bfloat16_rounds_matrices_only(tiny_model: Path, tmp_path: Path) -> None:
    artifact = write(convert(tiny_model, "pregate", 1), tmp_path / "artifact")
    export(prepare(artifact, "gguf"), tmp_path / "gguf", dtype="bfloat16")
    found = kinds(tmp_path / "gguf")
    assert found["blk.1.attn_q.weight"] == "BF16"
    assert found["blk.1.attn_norm.weight"] == "F32"
    assert found["blk.1.ffn_gate_inp.weight"] == "F32"
    assert found["blk.0.attn_q.weight"] == "F32"


def test_tokenizer_is_complete(demo_model: Path, tmp_path: Path) -> None:
    export(prepare(demo_model, "gguf"), tmp_path / "gguf", dtype="bfloat16")
    fields, _ = read(tmp_path / "gguf")
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = fields["tokenizer.ggml.tokens"]
    assert texts == tokenizer.convert_ids_to_tokens(range(8192))
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    model = json.loads((demo_model / "tokenizer.json").read_text())["model"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in model["merges"]]


def test_unknown_rules_for_cutting_text_are_refused(demo_model: Path, tmp_path: Path) -> None:
    data = json.loads((demo_model / "tokenizer.json").read_text())
    data["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedModel, match="Whitespace"):
        tokenizer_metadata(tmp_path, 8192)
    with pytest.raises(UnsupportedModel, match=r"token id 8191, the embedding has 100 rows"):
        tokenizer_metadata(demo_model, 100)


def test_rope_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=rope)
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 1.0 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    factors = _rope_factors(config.to_dict())
    assert factors is not None
    torch.testing.assert_close(plain / torch.from_numpy(factors), scaled, rtol=1e-5, atol=0)
    assert len(np.unique(factors)) > 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "silu"),
        ({"sliding_window": 16}, "sliding window"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"model_type": "gemma2"}, "no architecture"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    change: dict[str, Any], reason: str, demo_model: Path
) -> None:
    config = json.loads((demo_model / "config.json").read_text())
    assert not list(gguf_problems(config))
    assert reason in " ".join(gguf_problems(config | change))


def test_a_class_that_llama_cpp_would_not_load_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    artifact = write(convert(tiny_model, "pregate", 1), tmp_path / "artifact")
    with pytest.raises(UnsupportedModel, match="needs biases on q, k and v"):
        prepare(artifact, "gguf", via="qwen2-moe")


@LLAMA
@pytest.mark.parametrize("kind", ["dense", "pregate"])
def test_llama_cpp_continues_as_the_artifact_does(
    kind: str, demo_model: Path, tmp_path: Path
) -> None:
    source = demo_model
    if kind != "dense":
        source = write(convert(demo_model, "pregate", 1), tmp_path / "artifact")
    export(prepare(source, "gguf"), tmp_path / "gguf")
    report = verify(tmp_path / "gguf", target="llama.cpp", against=source)
    assert report.ok, report
    assert "96 of 96 tokens" in report.checks[-1].detail


@LLAMA
def test_llama_cpp_runs_our_codes(demo_model: Path, tmp_path: Path) -> None:
    source = write(convert(demo_model, "pregate", 1), tmp_path / "artifact", group=64)
    export(prepare(source, "gguf"), tmp_path / "gguf", codes=True)
    report = verify(tmp_path / "gguf", target="llama.cpp", against=source)
    assert report.ok, report
