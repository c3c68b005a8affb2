"""Choices of routers: tiny random mixtures of experts of several families, and our own models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fissile.errors import UnsupportedModel
from fissile.eval.routing import check_routers, collect_choices, find_routers
from fissile.run.metrics_routing import Redundancy

SMALL: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 6},
    "Qwen3Moe": {"num_experts": 6},
    "Olmoe": {"num_experts": 6},
    "Glm4Moe": {"n_routed_experts": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "GptOss": {"num_local_experts": 6},
}


def build(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, family + "Config")(**SMALL, **FAMILIES[family])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 8192, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_are_those_of_the_router_logits(family: str, ids: torch.Tensor) -> None:
    model = build(family)
    found = collect_choices(model, ids, where=family, batch_tokens=32)
    assert not any(module._forward_hooks for module in model.modules())  # none is left behind
    layers = [1, 2] if family == "Glm4Moe" else [0, 1, 2]
    assert (found.layers, found.num_experts, found.decides) == (layers, 6, "layerwise")
    assert torch.equal(found.sequence_T, torch.arange(5).repeat_interleave(16))
    # The library's own way to ask, whole batch at once. Biases are zero in a fresh model.
    logits = model(ids, output_router_logits=True).router_logits
    assert len(logits) == len(layers)
    for index_TK, logits_TE in zip(found.index, logits, strict=True):
        expected = logits_TE.reshape(-1, 6).topk(2, dim=-1).indices
        assert torch.equal(index_TK.sort(1).values, expected.sort(1).values)


def test_a_selection_bias_is_part_of_the_choice(ids: torch.Tensor) -> None:
    model = build("Glm4Moe")
    model.model.layers[1].mlp.gate.e_score_correction_bias[4] = 5.0
    found = collect_choices(model, ids, where="m")
    assert bool((found.index[0] == 4).any(1).all())
    assert not bool((found.index[1] == 4).any(1).all())


def test_dense_models_are_refused_before_their_weights_are_read(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(UnsupportedModel, match="'llama' has no routers; it is a dense model"):
        check_routers(tmp_path, {"model_type": "llama"})
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModel, match=r"no routers|cannot build"):
        check_routers(tmp_path, {"model_type": "bert"})
    for routing in (None, {"kind": "static"}):
        with pytest.raises(UnsupportedModel, match="no router"):
            check_routers(tmp_path, {"model_type": "fissile", "routing": routing})


def test_our_experts_say_what_they_were_called_with(finished_run: Path, ids: torch.Tensor) -> None:
    import fissile

    model = fissile.load(finished_run / "model")
    routers = find_routers(model, "m")
    assert [r.layer for r in routers] == [0, 1]
    found = collect_choices(model, ids, where="m", batch_tokens=16)
    assert (len(found.index), found.decides, found.num_experts) == (1, "pregate", 4)
    assert model.model.router is not None
    seen: list[torch.Tensor] = []
    handle = model.model.router.register_forward_hook(lambda *a: seen.append(a[2].detach()))
    model(ids)
    handle.remove()
    assert torch.equal(found.index[0], seen[0][0].topk(1, dim=-1).indices)


def test_weight_zero_is_not_chosen() -> None:
    from fissile.eval.routing import _given

    index = torch.tensor([[0, 2], [1, 3]])
    found = _given((None, index, torch.tensor([[1.0, 0.0], [1.0, 1.0]])), None)
    assert found.tolist() == [[0, -1], [1, 3]]


def test_the_command_writes_numbers_and_page(
    demo_model: Path,
    tmp_path: Path,
    text_file: Path,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    source, out = tmp_path / "moe", tmp_path / "out"
    build("Mixtral").save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, source / name)
    words = ["routing", source, "--data", text_file, "--tokens", "640", "-q"]
    code, text, _ = run_cli(*words, "--out", out)
    assert code == 0
    assert "640 tokens, 2 of 6 experts per token, layerwise" in text
    stored = json.loads((out / "routing.json").read_text())
    found = Redundancy.model_validate(stored["redundancy"])
    assert [row.layer for row in found.layers] == [0, 1, 2]
    assert stored["conditions"]["context"] == 64  # the model's maximum
    page = (out / "routing.html").read_text()
    assert page.count("<figure>") == 3
    assert "https:" not in page
    code, text, _ = run_cli(*words, "--json")
    again = json.loads(text)
    assert (code, again["redundancy"]) == (0, stored["redundancy"])


def test_the_command_on_our_own_and_on_dense_models(
    finished_run: Path,
    tiny_model: Path,
    text_file: Path,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    words = ["--data", text_file, "--tokens", "256", "--context", "32", "-q"]
    code, text, _ = run_cli("routing", finished_run, *words)
    assert code == 0
    assert "one decision before the first layer" in text
    code, text, err = run_cli("routing", tiny_model, *words)
    assert (code, text) == (3, "")
    assert err.endswith("model_type 'llama' has no routers; it is a dense model\n")
