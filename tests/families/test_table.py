"""Every family against the stock transformers classes: names, shapes, refusals."""

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

from fissile import families
from fissile.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from fissile.io.headers import open_checkpoint_headers
from fissile.io.reader import TensorReader
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biased": ("LlamaConfig", {"attention_bias": True, "head_dim": 24}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": None}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "olmo2": ("Olmo2Config", {}),
}


@cache
def stock(case: str) -> Any:
    """A tiny random model of the stock class, with biases and norms that are not trivial."""
    name, fields = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **fields})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["single", "sharded"])
def folder(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    size = "10GB" if request.param == "single" else "20KB"
    stock(case).save_pretrained(tmp_path, max_shard_size=size)
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert (shards == 1) == (request.param == "single")
    return tmp_path


def family_of(case: str) -> str:
    return case.partition("-")[0]


def test_stock_checkpoints_fit(case: str, folder: Path) -> None:
    headers = open_checkpoint_headers(folder)
    family = families.find(headers.config)
    assert family.name == family_of(case)
    families.check_checkpoint(headers, family)
    checks = families.explain_source(folder)
    assert all(check.ok for check in checks)
    assert checks[-1].field == "tensors"


def test_canonical_names_cover_every_parameter_once(case: str, folder: Path) -> None:
    """Reassembling the canonical tensors gives the stock state dict back, bit for bit."""
    reader = TensorReader(folder)
    family = families.find(reader.headers.config)
    state = stock(case).state_dict()
    if stock(case).config.tie_word_embeddings:
        state.pop("lm_head.weight")
    rebuilt: dict[str, list[torch.Tensor]] = {}
    for name, source in families.dense_names(family, reader.headers.config):
        begin, end = source.rows or (0, source.stored[0])
        tensor = reader.load_rows(source.name, begin, end)
        assert tuple(tensor.shape) == source.shape
        assert name.replace("mlp.shared.", "mlp.") == source.name or source.rows
        rebuilt.setdefault(source.name, []).append(tensor)
    assert rebuilt.keys() == state.keys()
    for name, parts in rebuilt.items():
        assert torch.equal(torch.cat(parts), state[name])


def test_classes_are_where_the_family_says(case: str) -> None:
    family = families.FAMILIES[family_of(case)]
    model, module = stock(case), family.module
    code = __import__(f"transformers.models.{module}.modeling_{module}", fromlist=["x"])
    layer = model.model.layers[0]
    assert type(layer.self_attn) is getattr(code, f"{family.prefix}Attention")
    assert type(model.model.norm) is getattr(code, f"{family.prefix}RMSNorm")
    assert type(model.model.rotary_emb) is getattr(code, f"{family.prefix}RotaryEmbedding")
    scaled = getattr(code, f"{family.prefix}TextScaledWordEmbedding", None)
    assert family.scaled_embedding == (scaled is not None)
    assert type(model.model.embed_tokens) is (scaled or torch.nn.Embedding)
    assert family.sdpa == type(model)._supports_sdpa
    norms = [n for n, _ in layer.named_children() if n.endswith("layernorm")]
    assert sorted(norms) == sorted(family.norms)
    linears = [n for n, m in layer.self_attn.named_children() if isinstance(m, torch.nn.Linear)]
    assert sorted(linears) == sorted(family.attention_linears)
    assert model.config.to_dict()[family.activation_field] == family.activation


def test_norms_run_in_the_order_the_layout_says(case: str) -> None:
    """Forward hooks record which of a layer's parts ran after which."""
    family = families.FAMILIES[family_of(case)]
    layer, order, hooks = stock(case).model.layers[0], [], []
    for name, module in layer.named_children():
        if name in (*family.norms, "mlp", "self_attn"):
            hook = module.register_forward_hook(lambda *_, name=name: order.append(name))
            hooks.append(hook)
    with torch.no_grad():
        stock(case)(torch.tensor([[1, 2, 3]]))
    for hook in hooks:
        hook.remove()
    assert [name for name in order if name in family.norms] == list(family.norms)
    before = {"pre": "post_attention_layernorm", "sandwich": "pre_feedforward_layernorm"}
    after = {"post": "post_feedforward_layernorm", "sandwich": "post_feedforward_layernorm"}
    place = order.index("mlp")
    assert order[place - 1] == before.get(family.norm_layout, "post_attention_layernorm")
    if family.norm_layout in after:
        assert order[place + 1] == after[family.norm_layout]


def test_attention_groups_share_their_input(case: str) -> None:
    family = families.FAMILIES[family_of(case)]
    attention, seen, hooks = stock(case).model.layers[0].self_attn, {}, []
    for name in family.attention_linears:
        linear = attention.get_submodule(name)
        hooks.append(
            linear.register_forward_hook(
                lambda _, args, __, name=name: seen.update({name: args[0]})
            )
        )
    with torch.no_grad():
        stock(case)(torch.tensor([[1, 2, 3]]))
    for hook in hooks:
        hook.remove()
    for group in family.attention:
        assert all(seen[name] is seen[group[0]] for name in group)
    assert len({id(seen[group[0]]) for group in family.attention}) == len(family.attention)


@pytest.mark.parametrize("case", ["llama", "gemma2", "phi3"], indirect=True)
def test_what_the_writer_makes_loads_in_transformers(case: str, tmp_path: Path) -> None:
    state = stock(case).state_dict()
    if stock(case).config.tie_word_embeddings:
        state.pop("lm_head.weight")
    plan = [PlannedTensor(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in state.items()]
    stock(case).config.save_pretrained(tmp_path)
    with ShardWriter(tmp_path, plan, max_shard_bytes=20_000) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, stock(case)(ids).logits)


def save(folder: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    stock("llama").save_pretrained(tmp_path)
    return tmp_path, load_file(tmp_path / "model.safetensors")


def check(folder: Path) -> None:
    headers = open_checkpoint_headers(folder)
    families.check_checkpoint(headers, families.find(headers.config))


def test_a_missing_tensor_is_named(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = llama
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save(folder, tensors)
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.mlp\.up_proj\.weight is missing$"):
        check(folder)
    last = families.explain_source(folder)[-1]
    assert (last.field, last.ok) == ("tensors", False)


def test_wrong_shapes_and_dtypes_are_named(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = llama
    tensors["model.norm.weight"] = torch.ones(31)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 56, dtype=torch.int8)
    save(folder, tensors)
    with pytest.raises(CorruptCheckpoint) as caught:
        check(folder)
    message = str(caught.value)
    assert "model.norm.weight has shape [31], expected [32]" in message
    assert "mlp.down_proj.weight is I8, accepted: F32, BF16, F16" in message


def test_a_config_that_promises_more_is_found(llama: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, tensors = llama
    save(folder, tensors, num_hidden_layers=5)
    with pytest.raises(CorruptCheckpoint, match=r"layers\.3.* is missing; .*; and 15 more$"):
        check(folder)


def test_tensors_without_a_place_are_not_dropped_silently(
    llama: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, tensors = llama
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save(folder, tensors)
    check(folder)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save(folder, tensors)
    with pytest.raises(CorruptCheckpoint, match=r"q_proj\.bias has no place"):
        check(folder)


def test_a_stored_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    stock("llama-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save(tmp_path, tensors)
    check(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown family": (
        {"model_type": "qwen3_next"},
        r"model_type: found 'qwen3_next', accepted: .*qwen3.*did you mean",
    ),
    "no family": ({"model_type": None}, "model_type: found None, accepted: gemma2, "),
    "biased FFN": ({"mlp_bias": True}, "mlp_bias: found True, accepted: False or None$"),
    "activation": ({"hidden_act": "xielu"}, "hidden_act: found 'xielu', accepted: silu, "),
    "no width": ({"hidden_size": None}, "hidden_size: found None, accepted: a positive integer"),
    "varying FFN": ({"intermediate_size": [1, 2]}, r"intermediate_size: found \[1, 2\]"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers: found 0"),
    "too many": ({"num_hidden_layers": 10**9}, "found 1000000000, accepted: at most"),
    "odd heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide the 4 heads"),
    "no heads": ({"num_key_value_heads": 0}, "num_key_value_heads is 0, accepted: a positive"),
    "attention": ({"layer_types": ["chunked_attention"] * 3}, "layer_types: found chunked"),
    "quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config: found 'gptq', accepted: None; start from the unquantized",
    ),
    "artifact of nothing": ({"model_type": "fissile"}, "backbone.family: found None"),
    "artifact of mamba": (
        {"model_type": "fissile", "backbone": {"family": "mamba"}},
        "backbone.family: found 'mamba', accepted: gemma2, ",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_field_value_and_what_is_accepted(name: str) -> None:
    changes, expected = REFUSED[name]
    config = {**stock("llama").config.to_dict(), **changes}
    with pytest.raises(UnsupportedModel, match=expected) as caught:
        families.find(config)
    assert "\n" not in str(caught.value)
    assert [c.ok for c in families.explain(config)].count(False) == 1


def test_layer_types_must_fit() -> None:
    config = stock("qwen3").config.to_dict()
    assert families.find(config).name == "qwen3"
    types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedModel, match=r"layer_types: found 2 of .*, accepted: 3 of"):
        families.find({**config, "layer_types": types})
    with pytest.raises(UnsupportedModel, match="layer_types: found 3 of linear_attention"):
        families.find({**config, "layer_types": ["linear_attention"] * 3})


def test_left_out_fields_take_the_stock_defaults(case: str) -> None:
    """Sizes from a config.json reduced to the required fields equal those of the stock class."""
    family = families.FAMILIES[family_of(case)]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = {"model_type": family.model_types[0], "num_attention_heads": 32}
    config |= {name: stock(case).config.to_dict()[name] * 64 for name in names}
    full = transformers.AutoConfig.for_model(**config)
    dims = families.dims_of(family, config)
    assert dims.kv_heads == full.num_key_value_heads
    stock_head = getattr(full, "head_dim", None) or full.hidden_size // 32
    assert dims.head_dim == stock_head
    assert dims.tied == full.tie_word_embeddings
    assert families.find(config) is family


def test_multimodal_gemma_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    text = stock("gemma3").config
    vision = transformers.SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=93,
        boi_token_index=94,
        eoi_token_index=95,
    )
    torch.manual_seed(0)
    src, out = tmp_path / "src", tmp_path / "out"
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(src)
    with pytest.raises(UnsupportedModel, match="model_type: found 'gemma3'") as caught:
        families.find(open_checkpoint_headers(src).config)
    remedy = str(caught.value).partition("with transformers: ")[2]
    assert remedy.startswith("m = Gemma3ForConditionalGeneration")
    exec(remedy, _names(src, out))
    check(out)
    ids = torch.arange(1, 20)[None]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, whole(ids).logits)


def _names(src: Path, out: Path) -> dict[str, Any]:
    return {
        "SRC": src,
        "OUT": out,
        "Gemma3ForCausalLM": transformers.Gemma3ForCausalLM,
        "Gemma3ForConditionalGeneration": transformers.Gemma3ForConditionalGeneration,
    }


def test_no_checkpoint_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not found"):
        families.explain_source(tmp_path / "nowhere")


def test_bad_shards_are_found_through_the_family(case: str, folder: Path, tmp_path: Path) -> None:
    """Dropping the last shard of a sharded checkpoint is noticed before any tensor is read."""
    shards = sorted(folder.glob("*.safetensors"))
    if len(shards) == 1:
        shutil.copy(shards[0], tmp_path / "keep")
        shards[0].write_bytes((tmp_path / "keep").read_bytes()[:-1])
    else:
        shards[-1].unlink()
    with pytest.raises(CorruptCheckpoint, match=r"truncated at|missing, but named"):
        open_checkpoint_headers(folder)
