"""Two layers of the trained demo model through the whole stage: what each part of it is worth.

Shapes: N windows, S tokens per window, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fissile.config import BlockStage, Quantize
from fissile.eval.corpus import build_corpus
from fissile.eval.documents import read_documents
from fissile.eval.tokens import load_tokenizer
from fissile.eval.windows import sample_windows
from fissile.io.units import UnitStore
from fissile.kernels import layout
from fissile.models.source import CheckpointSource
from fissile.models.stream import StreamedModel, batches
from fissile.quant.blocks import BlockData, BlockTrainer
from fissile.quant.decouple import solve
from fissile.quant.layers import QuantizedLayer, quantize_model
from fissile.quant.solvers import Solver
from fissile.quant.spill import Windows
from fissile.run.nesting import baseline_solver, nested_solver

LAYERS, CONTEXT = 2, 128


@dataclass
class World:
    """The demo model, calibration windows and held-out windows."""

    model: StreamedModel
    fit_NS: Tensor
    held_NS: Tensor


@pytest.fixture(scope="module")
def world(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder)
    source = CheckpointSource(demo_model)
    tokenizer = load_tokenizer(demo_model)

    def windows(name: str, tokens: int) -> Tensor:
        documents = read_documents(folder / name)
        ids, _, _ = sample_windows(documents, tokenizer, tokens, CONTEXT, 0, config=source.config)
        return ids.to(torch.int64)

    return World(
        StreamedModel(source), windows("calibration.jsonl", 5120), windows("heldout.jsonl", 1536)
    )


def settings(**changes: object) -> Quantize:
    return Quantize.model_validate({"effort": "fast", "blend": 0.0, "widths": [2], **changes})


def quantized(
    world: World,
    solver: Solver,
    store: UnitStore | None = None,
    count: int = LAYERS,
    windows: int | None = None,
) -> list[QuantizedLayer]:
    work = quantize_model(
        world.model,
        world.fit_NS[:windows],
        solver,
        group_size=64,
        attention=True,
        batch_tokens=2048,
        store=store,
    )
    return list(islice(work, count))


@torch.no_grad()
def drift(world: World, layers: list[QuantizedLayer], bits: int) -> float:
    """Error of the stream after the layers on held-out text, in units of the stream's square."""
    model, total = world.model, 0.0
    for part in batches(world.held_NS, 2048):
        want = got = model.embed(world.held_NS[part])
        context = model.context(want)
        for i, result in enumerate(layers):
            layer = model.layer(i)
            want = layer(want, None, context)
            own = {name: result.decode(name, bits) for name in result.groups}
            layer.load_state_dict(result.kept | own, assign=True)
            got = layer(got, None, context)
        error = (got - want).square().sum(-1) / want.square().sum(-1)
        total += float(error.mean()) * (part.stop - part.start)
    return total / len(world.held_NS)


def test_each_part_of_the_stage_helps_on_held_out_text(world: World) -> None:
    block = {"steps": 10, "batch_tokens": 1024}
    found = {
        name: drift(world, quantized(world, solver), 2)
        for name, solver in {
            "gptq": baseline_solver("gptq", 2, settings(), 0),
            "solved": nested_solver(settings(), 0),
            "aimed": nested_solver(settings(blend=0.5), 0),
            "trained": nested_solver(settings(blend=0.5, block=block), 0),
        }.items()
    }
    assert found["solved"] < 0.8 * found["gptq"]
    assert found["aimed"] < 0.97 * found["solved"]
    assert found["trained"] < 0.96 * found["aimed"]


def test_several_widths_in_one_pass_and_a_resume_in_the_middle(
    world: World, tmp_path: Path
) -> None:
    changes = {"widths": [2, 4, 8], "blend": 0.5, "block": {"steps": 2, "batch_tokens": 512}}
    solver = nested_solver(settings(**changes), 0)
    # In memory without a store, in files with one.
    whole = quantized(world, solver, windows=16)
    store = UnitStore(tmp_path / "units")
    quantized(world, solver, store, count=1, windows=16)
    assert [path.name for path in (tmp_path / "units").iterdir()] == ["layer_000.safetensors"]
    resumed = quantized(world, solver, store, windows=16)
    for first, second in zip(whole, resumed, strict=True):
        assert first.parts.keys() == second.parts.keys()
        assert all(torch.equal(first.parts[k], second.parts[k]) for k in first.parts)
        assert all(torch.equal(first.kept[k], second.kept[k]) for k in first.kept)
        assert first.record() == second.record()
    assert [set(before) for before, _ in whole[0].block] == [{2, 4}] * 4
    for layer in whole:
        assert all(after[k] <= before[k] for before, after in layer.block for k in (2, 4))
    errors = [drift(world, whole, bits) for bits in (2, 4, 8)]
    assert errors[1] < 0.2 * errors[0]
    # The code of four bits more is solved against the whole Hessian of the original weights.
    assert errors[2] < 0.05 * errors[1], errors


def trainer_of(
    world: World, widths: tuple[int, ...] = (2,), **changes: object
) -> tuple[BlockTrainer, dict[str, Tensor]]:
    """A trainer on layer 0 with its query projection already quantized."""
    model = world.model
    layer, ids = model.layer(0), world.fit_NS[:16]
    hidden = model.embed(ids)
    with torch.no_grad():
        target = layer(hidden, None, model.context(hidden))
    names = [f"self_attn.{name}_proj.weight" for name in "qko"]
    block = BlockStage.model_validate({"steps": 6, "batch_tokens": 512, **changes})
    streams = {bits: Windows.of(hidden) for bits in widths}
    data = BlockData(streams, Windows.of(target), lambda _: None, model.context)
    trainer = BlockTrainer(layer, names, data, block, 0)
    weight = dict(layer.named_parameters())[names[0]].detach()
    nested = solve(weight, torch.eye(weight.shape[1]), widths=widths, effort="fast")
    trainer.fix(names[0], nested)
    return trainer, {name: x.clone() for name, x in trainer.free(2).items()}


def test_training_moves_floats_norms_and_weights_but_no_codes(world: World) -> None:
    trainer, before = trainer_of(world)
    codes = {name: nested.codes.clone() for name, nested in trainer.finish().items()}
    start = trainer.finish()
    trainer.train()
    errors = trainer.curve[0]
    assert errors[1][2] < 0.95 * errors[0][2]
    after = trainer.free(2)
    assert set(after) == {
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    for name in ("self_attn.k_proj.weight", "input_layernorm.weight"):
        assert not torch.equal(after[name], before[name])
        # Moves far below what bfloat16, the type of the checkpoint, could hold are kept.
        assert after[name].dtype == torch.float32
        assert not torch.equal(after[name], after[name].bfloat16().float())
    for name, nested in trainer.finish().items():
        assert torch.equal(nested.codes, codes[name])
        assert not torch.equal(nested.scale[2], start[name].scale[2])
        half = nested.scale[2].half().float()
        assert torch.equal(nested.scale[2], half)
        parts = nested.parts()
        assert torch.equal(layout.dequantize(parts, 2), nested.dequantize(2))


def test_a_round_that_does_not_help_is_undone(world: World) -> None:
    trainer, before = trainer_of(world, weight_rate=50.0, float_rate=50.0)
    trainer.train()
    assert trainer.curve[0][0] == trainer.curve[0][1]
    for name, x in trainer.free(2).items():
        assert torch.equal(x, before[name])


def test_without_rates_nothing_but_scales_and_zeros_moves(world: World) -> None:
    trainer, before = trainer_of(world, weight_rate=0.0, norm_rate=0.0)
    trainer.train()
    assert set(trainer.free(2)) == {"self_attn.k_proj.weight", "self_attn.o_proj.weight"}
    for name, x in trainer.free(2).items():
        assert torch.equal(x, before[name])
    assert trainer.curve[0][1][2] < trainer.curve[0][0][2]


def test_every_width_moves_weights_of_its_own(world: World) -> None:
    trainer, before = trainer_of(world, (2, 4), steps=1)
    trainer.train()
    name = "self_attn.o_proj.weight"
    moved = {bits: trainer.free(bits)[name] - before[name] for bits in (2, 4)}
    norm = "input_layernorm.weight"
    assert torch.equal(trainer.free(2)[norm], before[norm])
    # A step of Adam is its rate.
    step = 1e-2 * float(before[name].square().mean().sqrt())
    for bits, share in ((2, 1.0), (4, 0.25)):
        assert float(moved[bits].abs().median()) == pytest.approx(share * step, rel=1e-2)


def test_products_in_bfloat16_train_nearly_the_same(world: World) -> None:
    found = {}
    for kind in ("float32", "bfloat16"):
        trainer, _ = trainer_of(world, precision=kind)
        trainer.train()
        found[kind] = trainer
    (before, after), (start, low) = (found[k].curve[0] for k in ("float32", "bfloat16"))
    assert start == before
    assert after[2] < 0.95 * before[2]
    gain = before[2] - after[2]
    assert 0 < abs(low[2] - after[2]) < 0.1 * gain
    assert all(x.dtype == torch.float32 for x in found["bfloat16"].free(2).values())
