"""Nested weights at run time: what is held, which code multiplies, and that nothing is lost."""

from __future__ import annotations

import copy
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fissile.kernels import dispatch
from fissile.kernels.layout import loaded_bytes
from fissile.models import load, modules_fissile, nested_fissile
from fissile.models.nested_fissile import NestedTensor, paths

IDS = torch.tensor([[5, 17, 230, 8, 99, 41, 7, 3, 1000, 12, 4, 66]])


@pytest.fixture(params=[2, 3, 4])
def model(request: pytest.FixtureRequest, finished_run: Path) -> Any:
    """A routed model with nested attention, shared and routed experts."""
    return load(finished_run, bits=request.param)


def weights(model: Any) -> list[NestedTensor]:
    return [m for m in model.modules() if isinstance(m, NestedTensor)]


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def decoded_one_by_one(model: Any) -> Tensor:
    """Logits of IDS, each token alone on the cache of those before."""
    past: Any = None
    rows: list[Tensor] = []
    with torch.inference_mode():
        for token in IDS.split(1, dim=1):
            out = model(input_ids=token, past_key_values=past, use_cache=True)
            past, rows = out.past_key_values, [*rows, out.logits]
    return torch.cat(rows, dim=1)


def in_float64(model: Any) -> Tensor:
    """The same weights, decoded and multiplied in float64."""
    return logits(copy.deepcopy(model).double())


def test_logits_are_those_of_the_decoded_weights(model: Any) -> None:
    want = in_float64(model)
    assert float(want.abs().max()) > 0.1
    for got in (logits(model), decoded_one_by_one(model), logits(model, IDS.repeat(9, 1))[:1]):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
    assert [*paths(model)] == ["columns: packed codes on the CPU"]
    assert sum(paths(model).values()) == len(weights(model))


def test_the_packed_codes_are_used(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tokens reach no decoder: neither the stored parts' nor the columns'."""
    logits(model)

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("a weight was decoded")

    monkeypatch.setattr(nested_fissile, "dequantize", refuse)
    monkeypatch.setattr(nested_fissile, "multiply_decoded", refuse)
    assert torch.isfinite(decoded_one_by_one(model)).all()
    with pytest.raises(AssertionError, match="decoded"):
        logits(model, IDS.repeat(9, 1))


def test_parts_are_dropped_and_come_back(model: Any, finished_run: Path) -> None:
    before = {name: part.clone() for name, part in model.state_dict().items()}
    logits(model)
    for weight in weights(model):
        held = sum(buffer.nbytes for buffer in weight.buffers())
        packed = loaded_bytes(weight.shape, weight.group_size, weight.bits)
        # A table has four bytes a column; three bits are held as four, companded values as six.
        values = math.prod(weight.shape)
        columns = 4 * values // weight.shape[-2]
        digits = weight.companding != 1 and weight.bits > 2
        more = {2: 0, 3: 1, 4: 0}[weight.bits] + 2 * digits
        assert held == packed + values * more // 8 + columns * (1 + digits)
    again = model.state_dict()
    assert list(again) == list(before)
    assert all(torch.equal(again[name], part) for name, part in before.items())
    expected = logits(model)
    other = load(finished_run, bits=weights(model)[0].bits)
    for parameter in other.parameters():
        parameter.data.zero_()
    logits(other)  # loading into a model that holds columns
    other.load_state_dict(before)
    assert torch.equal(logits(other), expected)
    assert torch.equal(logits(copy.deepcopy(model)), expected)


def test_a_first_use_by_many_threads(model: Any) -> None:
    expected = logits(copy.deepcopy(model))
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)


def test_gradients_pass_through(model: Any) -> None:
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    with torch.inference_mode():
        layer(x.detach())
    layer(x).square().sum().backward()
    weight = copy.deepcopy(layer.weight).dense(torch.float64)
    want = 2 * (x.double() @ weight.T) @ weight
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), want, rtol=1e-4, atol=1e-6)


def test_without_the_operators_every_product_decodes(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = in_float64(model)
    monkeypatch.setattr(nested_fissile, "unavailable", lambda: "no such operator")
    torch.testing.assert_close(logits(model).double(), want, rtol=1e-4, atol=2e-5)
    assert [*paths(model)] == ["decoded: no such operator"]
    assert all(weight.held is None for weight in weights(model))


def test_compiled_kernels_take_the_whole_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's path, with the CPU kernels of its operators."""
    want, calls = in_float64(model), []
    state = {name: part.clone() for name, part in model.state_dict().items()}

    def kernels_for(parts: list[NestedTensor], *_: Any) -> Any:
        calls.append(len(parts))
        return dispatch

    for module in (nested_fissile, modules_fissile):
        monkeypatch.setattr(module, "kernels_for", kernels_for)
    for _ in range(2):
        torch.testing.assert_close(logits(model).double(), want, rtol=1e-4, atol=2e-5)
    assert {1, 2, 3} == set(calls)  # linears, experts, shared MLPs
    mlp = model.model.layers[0].mlp.shared
    assert mlp.gate_proj.weight.held is mlp.up_proj.weight.held
    again = model.state_dict()
    assert all(torch.equal(again[name], part) for name, part in state.items())
    assert list(again) == list(state)


def test_a_product_that_no_kernel_takes_says_why(model: Any) -> None:
    weight = weights(model)[0].to("meta")
    module, why = nested_fissile.compiled_kernels()
    assert module is dispatch
    assert why == "fissile is installed"
    assert weight.path() == ("decoded", "no kernels for device meta")


def test_a_batch_has_one_width(model: Any) -> None:
    with pytest.raises(ValueError, match="one for all tokens of a batch"):
        model(input_ids=IDS, bits=2)
