"""Floats of the whole demo model towards its own predictions: nearer, resumable, never worse."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fissile.config import Quantize
from fissile.errors import Interrupted
from fissile.eval.corpus import build_corpus
from fissile.eval.documents import read_documents
from fissile.eval.tokens import load_tokenizer
from fissile.eval.windows import sample_windows
from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource, load_source
from fissile.models.stream import StreamedModel
from fissile.quant.layers import final_layer, quantize_model, read_layer
from fissile.quant.tune import TunedModel
from fissile.run.nesting import baseline_solver, decoded
from fissile.run.tuning import Tuning, moving_widths

CONTEXT, BITS = 128, 3


@dataclass
class Rounded:
    """The demo model rounded to three bits, its calibration windows and held-out windows."""

    source: CheckpointSource
    fit_NS: Tensor
    held_NS: Tensor
    folder: Path

    def store(self, folder: Path) -> UnitStore:
        """A copy of the rounded layers."""
        store, made = UnitStore(folder), UnitStore(self.folder)
        for i in range(self.source.config.num_base_layers):
            tensors, record = made.load(f"layer_{i:03d}")
            store.save(f"layer_{i:03d}", tensors, record)
        return store


@pytest.fixture(scope="module")
def rounded(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    folder = tmp_path_factory.mktemp("tune")
    build_corpus(folder)
    source, tokenizer = CheckpointSource(demo_model), load_tokenizer(demo_model)

    def windows(name: str, tokens: int) -> Tensor:
        documents = read_documents(folder / name)
        ids, _, _ = sample_windows(documents, tokenizer, tokens, CONTEXT, 0, config=source.config)
        return ids.to(torch.int64)

    fit, held = windows("calibration.jsonl", 4096), windows("heldout.jsonl", 1024)
    solver = baseline_solver("rtn", BITS, Quantize(effort="fast"), 0)
    work = quantize_model(
        StreamedModel(source),
        fit[:2],
        solver,
        group_size=64,
        attention=True,
        batch_tokens=1024,
        store=UnitStore(folder / "units"),
    )
    for _ in work:
        pass
    return Rounded(source, fit, held, folder / "units")


def tuning(world: Rounded, folder: Path, **changes: object) -> Tuning:
    tune = {"steps": 6, "batch_tokens": 512, "context": CONTEXT, "checkpoint_every": 2, **changes}
    settings = Quantize.model_validate({"effort": "fast", "widths": [BITS], "tune": tune})
    targets = UnitStore(folder / "teacher")
    return Tuning(world.source, world.fit_NS, settings, 0, targets, lambda *_: None)


@torch.no_grad()
def divergence(world: Rounded, store: UnitStore) -> float:
    """KL from the float model over the whole vocabulary on held-out text, in float64."""
    count = world.source.config.num_base_layers
    layers = (final_layer(store, i) for i in range(count))
    own, float_model = load_source(decoded(world.source, layers)), load_source(world.source)
    want = float_model(input_ids=world.held_NS).logits.double().log_softmax(-1)
    got = own(input_ids=world.held_NS).logits.double().log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())


def test_predictions_come_nearer_and_a_killed_run_ends_in_the_same_bytes(
    rounded: Rounded, tmp_path: Path
) -> None:
    store = rounded.store(tmp_path / "whole")
    start = divergence(rounded, store)
    record = tuning(rounded, tmp_path).run(rounded.source, store)
    assert record["after"][str(BITS)] < 0.9 * record["before"][str(BITS)]
    assert divergence(rounded, store) < 0.93 * start
    count = rounded.source.config.num_base_layers
    for i in range(count):
        solved, final = read_layer(store, i), final_layer(store, i)
        assert any(not torch.equal(final.parts[k], solved.parts[k]) for k in final.parts)
        for name, part in solved.parts.items():
            assert "theta" in name or torch.equal(part, final.parts[name])
        moved = {k for k in solved.kept if not torch.equal(solved.kept[k], final.kept[k])}
        assert moved == {"input_layernorm.weight", "post_attention_layernorm.weight"}

    def stop(stage: str, done: int, total: int, detail: str) -> None:
        if done == 3:
            raise Interrupted("stopped")

    other = rounded.store(tmp_path / "stopped")
    work = tuning(rounded, tmp_path)
    cut = Tuning(work.teacher, work.ids_NS, work.settings, work.seed, work.targets, stop)
    with pytest.raises(Interrupted):
        cut.run(rounded.source, other)
    assert not other.has("tuned_000")
    assert work.run(rounded.source, other)["after"] == record["after"]
    for i in range(count):
        one, two = (final_layer(s, i) for s in (store, other))
        assert all(torch.equal(one.parts[k], two.parts[k]) for k in one.parts)
        assert all(torch.equal(one.kept[k], two.kept[k]) for k in one.kept)


def test_what_does_not_help_is_undone(rounded: Rounded, tmp_path: Path) -> None:
    store = rounded.store(tmp_path / "units")
    record = tuning(rounded, tmp_path, steps=2, learning_rate=3.0).run(rounded.source, store)
    assert record["after"] == record["before"]
    for i in range(rounded.source.config.num_base_layers):
        solved, final = read_layer(store, i), final_layer(store, i)
        assert all(torch.equal(solved.parts[k], final.parts[k]) for k in solved.parts)
        assert all(torch.equal(solved.kept[k], final.kept[k]) for k in solved.kept)


def test_what_wider_widths_rest_on_does_not_move(rounded: Rounded) -> None:
    assert moving_widths((2, 3, 4)) == (2, 3, 4)
    assert moving_widths((2, 3, 4, 6, 8)) == (2, 3)
    assert moving_widths((4, 8)) == ()
    layers = [read_layer(UnitStore(rounded.folder), i) for i in range(6)]
    with pytest.raises(ValueError, match=r"widths \[2\], stored: \[3\]"):
        TunedModel(StreamedModel(rounded.source), layers, (2,), norms=False)
