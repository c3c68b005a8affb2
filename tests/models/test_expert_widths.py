"""Stacks whose experts have widths of their own: what is loaded, held and computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.converted import convert, plan_of, with_plan, write
from torch import Tensor
from transformers import AutoModelForCausalLM

from fissile.errors import CorruptCheckpoint
from fissile.eval.run import default_bits
from fissile.families.artifact import plan_summary
from fissile.io.headers import open_checkpoint_headers
from fissile.kernels import dispatch
from fissile.kernels.layout import loaded_bytes
from fissile.models import load, modules_fissile, nested_fissile
from fissile.models.nested_fissile import NestedTensor, paths
from fissile.models.source import CheckpointSource, filled, load_source
from fissile.models.stacks_fissile import NestedStack, tensors_of
from fissile.run.card import model_card
from fissile.run.inspect import inspect_source

IDS = torch.tensor([[5, 17, 230, 8, 99, 41, 7, 3, 1000, 12, 4, 66]])
PLAN = ([4, 2, 3, 2], [2, 2, 4, 2])
"""Widths of the experts of both layers."""


def plan(artifact: Path) -> dict[str, Any]:
    """Attention at 4 bits, shared neurons at 3, experts by `PLAN`."""
    return plan_of(artifact, lambda layer: PLAN[layer])


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four routed experts a layer, two of them for a token, at 2, 3 and 4 bits; read-only."""
    model = convert(tiny_model, "pregate", 2, shares=(2,))
    return write(model, tmp_path_factory.mktemp("plan") / "plain", group=32, widths=(2, 3, 4))


@pytest.fixture(scope="module")
def folder(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a width for every expert."""
    return with_plan(tmp_path_factory.mktemp("plan") / "model", artifact, plan(artifact))


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def decoded(folder: Path) -> Tensor:
    """Logits of a float model, each weight and each expert put together from loads at one width."""
    single = {bits: CheckpointSource(folder, bits) for bits in (2, 3, 4)}
    source = CheckpointSource(folder)
    assert source.nested is not None
    model = load_source(source)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, widths in source.nested["mixed"].items():
        _, _, layer, rest = name.split(".", 3)
        whole = {bits: own.layer_state(int(layer))[rest] for bits, own in single.items()}
        if isinstance(widths, int):
            state[name] = whole[widths]
        else:
            state[name] = torch.stack([whole[bits][e] for e, bits in enumerate(widths)])
    return logits(filled(model, state).double())


def test_every_expert_is_computed_at_its_own_width(folder: Path) -> None:
    want, model = decoded(folder), load(folder)
    assert float(want.abs().max()) > 0.1
    # Few tokens, many, and one more time from what is held by then.
    for got in (logits(model), logits(model, IDS.repeat(9, 1))[:1], logits(model)):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
    assert [*paths(model)] == ["columns: packed codes on the CPU"]
    for bits in (2, 3, 4):
        assert (logits(load(folder, bits=bits)) - want).abs().max() > 1e-3
    torch.testing.assert_close(
        logits(load_source(CheckpointSource(folder))).double(), want, rtol=1e-4, atol=2e-5
    )


def test_the_folder_loads_without_fissile_classes(folder: Path) -> None:
    want = logits(load(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
    assert torch.equal(logits(model), want)
    # What a loader that reserves memory first asks for.
    for name, tensor in model.state_dict().items():
        assert model.get_parameter_or_buffer(name).shape == tensor.shape


def stacks(model: Any) -> list[NestedStack]:
    return [m for m in model.modules() if isinstance(m, NestedStack)]


def test_only_the_planes_of_an_experts_width_are_held(folder: Path) -> None:
    model = load(folder)
    assert len(stacks(model)) == 4
    for stack in stacks(model):
        tensors = tensors_of(stack)
        group = tensors[0].group_size
        held = sum(buffer.nbytes for tensor in tensors for buffer in tensor.buffers())
        assert held == sum(loaded_bytes(stack.shape[1:], group, bits) for bits in stack.bits_E)
        assert stack.bits_E in (tuple(PLAN[0]), tuple(PLAN[1]))


def test_saved_states_come_back(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    assert {n for n in before if ".experts." in n} == {
        n for n in open_checkpoint_headers(folder).tensors if ".experts." in n
    } - {f"model.layers.1.mlp.experts.{w}_proj.theta_3" for w in ("gate_up", "down")}
    want = logits(model)
    after = model.state_dict()
    assert [*after] == [*before]
    assert all(torch.equal(after[name], part) for name, part in before.items())
    other = load(folder)
    for stack in stacks(other):
        for buffer in stack.buffers():
            buffer.zero_()
    assert not torch.equal(logits(other), want)
    other.load_state_dict(before)
    assert torch.equal(logits(other), want)
    assert torch.equal(logits(copy.deepcopy(model)), want)
    del before["model.layers.0.mlp.experts.down_proj.plane_3"]
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj.*plane_3"):
        other.load_state_dict(before)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), want)


def test_compiled_kernels_take_one_width_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's path, with the CPU kernels of its operators."""
    want, model, widths = decoded(folder), load(folder), []

    def kernels_for(parts: list[NestedTensor], *_: Any) -> Any:
        widths.append([part.bits for part in parts])
        return dispatch

    for module in (nested_fissile, modules_fissile):
        monkeypatch.setattr(module, "kernels_for", kernels_for)
    torch.testing.assert_close(logits(model).double(), want, rtol=1e-4, atol=2e-5)
    assert [2, 3, 4, 2, 3, 4] in widths
    assert [2, 4, 2, 4] in widths


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([2, 3, 4], "3 widths"),
        ([2, 3, 4, 5], "5"),
        ([2, 3, 4, "x"], "x"),
    ],
)
def test_a_plan_that_fits_no_stack_is_refused(
    artifact: Path, tmp_path: Path, widths: list[Any], message: str
) -> None:
    mixed = {n: widths if ".experts." in n else 2 for n in plan(artifact)}
    folder = with_plan(tmp_path / "model", artifact, mixed)
    for read in (load, CheckpointSource):
        with pytest.raises(CorruptCheckpoint, match=f"mixed of model.*{message}"):
            read(folder)


def test_an_expert_has_one_width(artifact: Path, tmp_path: Path) -> None:
    mixed = plan(artifact)
    mixed["model.layers.0.mlp.experts.down_proj"] = [2, 4, 3, 2]
    folder = with_plan(tmp_path / "model", artifact, mixed)
    with pytest.raises(CorruptCheckpoint, match="two weights differ in width"):
        load(folder)


def test_a_list_is_for_stacks_alone(artifact: Path, tmp_path: Path) -> None:
    mixed = plan(artifact)
    mixed["model.layers.0.self_attn.q_proj.weight"] = [2, 4]
    folder = with_plan(tmp_path / "model", artifact, mixed)
    for read in (load, CheckpointSource):
        with pytest.raises(CorruptCheckpoint, match=r"mixed of model.*q_proj"):
            read(folder)


def test_what_is_told_of_a_plan(folder: Path, artifact: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    told = {"weights": "3b 6, 4b 8", "experts": "2b 5, 3b 1, 4b 2"}
    assert plan_summary(config) == inspect_source(folder)["plan"] == told
    assert "by default weights 3b 6, 4b 8; experts 2b 5, 3b 1, 4b 2 |" in model_card(folder)
    assert default_bits(config) is None
    assert default_bits(config | {"bits": 3}) == 3
    plain = json.loads((artifact / "config.json").read_text())
    assert plan_summary(plain) is None
    assert inspect_source(artifact)["default_bits"] == default_bits(plain) == 4
