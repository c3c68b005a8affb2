"""Tied floats: against float64 least squares row by row, and on a layer of the trained model."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.quant import layers
from torch import Tensor

from fissile.config import Effort, Quantize
from fissile.eval.tokens import load_tokenizer
from fissile.kernels import layout
from fissile.models.source import CheckpointSource, load_source
from fissile.quant import tied as module
from fissile.quant.decouple import solve
from fissile.quant.effort import PLANS
from fissile.quant.nested import NestedWeight
from fissile.quant.residual import with_residual
from fissile.quant.soft import SoftFloats

LAMBDA = torch.tensor([3 * 16, 64.0, 256.0], dtype=torch.float64)


def root(hessian: Tensor) -> np.ndarray:
    """R with R^T R = H, so that |R x|^2 is the loss of x."""
    return np.linalg.cholesky(hessian.double().numpy()).T


def damped(hessian: Tensor) -> Tensor:
    return hessian / hessian.diagonal().mean() + 0.01 * torch.eye(len(hessian))


def best_coefficients(
    nested: NestedWeight, weight: Tensor, hessian: Tensor, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """lstsq of (a, o, e) in float64, one row after the other, and the losses of the rows."""
    factor, base = root(hessian), nested.widths[-1]
    repeat = nested.group_size
    value = layout.values(nested.codes >> (4 - bits), bits, nested.companding).double().numpy()
    scale = nested.scale[base].double().repeat_interleave(repeat, -1).numpy()
    zero = nested.zero[base].double().repeat_interleave(repeat, -1).numpy()
    found, losses = [], []
    for row, wanted in enumerate(weight.double().numpy()):
        features = np.stack([scale[row] * value[row], scale[row], zero[row]], axis=1)
        best, *_ = np.linalg.lstsq(factor @ features, factor @ wanted, rcond=None)
        found.append(best)
        losses.append(np.square(factor @ (features @ best - wanted)).sum())
    return np.array(found), np.array(losses)


@pytest.mark.parametrize("companding", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["iid", "power", "outliers"])
def test_coefficients_are_the_least_squares_of_each_row(kind: str, companding: float) -> None:
    weight, hessian = layers.weight(24, 128), layers.hessian(128, kind)
    nested = solve(weight, hessian, group_size=32, tied=True, companding=companding)
    for bits in (2, 3):
        want, least = best_coefficients(nested, weight, damped(hessian), bits)
        error = nested.dequantize(bits) - weight
        loss = layers.loss_rows(error, damped(hessian)).numpy()
        # Apart from float16 of coefficients, scales and zeros, which may also help.
        assert np.abs(loss / least - 1).max() < 2e-2
        assert abs(loss.sum() / least.sum() - 1) < 2e-3
        off = np.abs(nested.tied[bits][:, 0].numpy() - want[:, 0]) / want[:, 0]
        assert np.median(off) < 0.01
        # Coefficients that are a little off would be seen.
        moved = nested.tied[bits] * torch.tensor([1.02, 1.0, 1.0])
        scale, zero = layout.tied_floats(moved, nested.scale[4], nested.zero[4])
        scales, zeros = {**nested.scale, bits: scale}, {**nested.zero, bits: zero}
        wrong = replace(nested, scale=scales, zero=zeros).dequantize(bits) - weight
        assert layers.loss_rows(wrong, damped(hessian)).sum() > 1.008 * float(least.sum())


def test_floats_of_the_widest_are_the_joint_least_squares() -> None:
    """With the coefficients fixed, all widths are linear in the floats of the widest: lstsq."""
    weight, hessian = layers.weight(12, 128), layers.hessian(128, "power")
    nested = solve(weight, hessian, group_size=32, tied=True)
    factor, lam = root(damped(hessian)), (LAMBDA / LAMBDA.sum()).numpy()
    ones = np.kron(np.eye(4), np.ones((32, 1)))
    ties = {k: x.double().numpy() for k, x in nested.tied.items()}
    ties[4] = np.tile([1.0, 0.0, 1.0], (12, 1))
    total = least = 0.0
    for row, wanted in enumerate(weight.double().numpy()):
        blocks, sides = [], []
        for weigh, bits in zip(lam, (2, 3, 4), strict=True):
            a, o, e = ties[bits][row]
            code = (nested.codes[row] >> (4 - bits)).double().numpy()
            design = np.concatenate([ones * (a * code + o)[:, None], e * ones], axis=1)
            blocks.append(np.sqrt(weigh) * factor @ design)
            sides.append(np.sqrt(weigh) * factor @ wanted)
            error = nested.dequantize(bits)[row].double().numpy() - wanted
            total += weigh * np.square(factor @ error).sum()
        design, side = np.concatenate(blocks), np.concatenate(sides)
        best, *_ = np.linalg.lstsq(design, side, rcond=None)
        least += np.square(design @ best - side).sum()
    assert abs(total / least - 1) < 1e-3


@pytest.mark.parametrize("effort", ["fast", "balanced"])
@pytest.mark.parametrize("kind", ["chain", "outliers"])
def test_the_objective_of_a_row_never_rises_and_is_the_true_one(kind: str, effort: Effort) -> None:
    weight, hessian = layers.weight(40, 128), 37.0 * layers.hessian(128, kind)
    nested = solve(weight, hessian, effort=effort, tied=True)
    history = nested.history
    assert len(history) == 1 + PLANS[effort].alternations + PLANS[effort].retries
    assert (history[1:] <= history[:-1]).all()
    assert (history[-1] < history[0]).any()
    errors = torch.stack([nested.dequantize(k) - weight for k in (2, 3, 4)])
    truth = torch.einsum(
        "w,wo->o", LAMBDA / LAMBDA.sum(), layers.loss_rows(errors, damped(hessian))
    )
    torch.testing.assert_close(history[-1], truth, rtol=1e-4, atol=0)


def test_rows_and_layers_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = layers.weight(2, 24, 64)
    hessian = torch.stack([layers.hessian(64, "chain"), layers.hessian(64, "power")])
    together = solve(weight, hessian, effort="fast", group_size=32, tied=True)
    monkeypatch.setattr(
        module, "row_chunks", lambda rows, *_: [slice(i, i + 1) for i in range(rows)]
    )
    for i in range(2):
        alone = solve(weight[i], hessian[i], effort="fast", group_size=32, tied=True)
        assert torch.equal(alone.codes, together.codes[i])
        assert torch.equal(alone.tied[2], together.tied[2][i])
        assert torch.equal(alone.dequantize(3), together.dequantize(3)[i])
    pieces = together.split([10, 14])
    assert torch.equal(pieces[1].tied[3], together.tied[3][:, 10:])


@pytest.mark.parametrize("widths", [(2, 3, 4), (2, 4), (2, 3), (2, 3, 4, 6, 8)])
def test_parts_decode_to_the_weight_and_come_back(widths: tuple[int, ...]) -> None:
    weight, hessian = layers.weight(3, 16, 64), torch.stack([layers.hessian(64, "power")] * 3)
    below = tuple(k for k in widths if k <= 4)
    nested = solve(weight, hessian, widths=below, group_size=32, effort="fast", tied=True)
    if widths[-1] > 4:
        nested = with_residual(nested, weight, hessian, widths[len(below) :])
    parts = nested.parts()
    assert list(parts) == list(layout.stored_names(widths, tied=True))
    held = sum(part.numel() * part.element_size() for part in parts.values())
    assert held == layout.stored_bytes(weight.shape, 32, widths, tied=True)
    back = NestedWeight.from_parts(parts, 32)
    assert back.widths == widths
    assert list(back.parts()) == list(parts)
    assert all(torch.equal(part, parts[name]) for name, part in back.parts().items())
    errors = []
    for bits in widths:
        own = {name: parts[name] for name in layout.segment_names(bits, widths, tied=True)}
        decoded = layout.dequantize(own, bits)
        assert torch.equal(decoded, nested.dequantize(bits))
        assert torch.equal(decoded, back.dequantize(bits))
        truth = layers.loss_rows(decoded - weight, hessian)
        torch.testing.assert_close(nested.loss[bits].double(), truth, rtol=1e-5, atol=0)
        errors.append(float(truth.sum()))
    assert all(wide < narrow / 2 for narrow, wide in pairwise(errors))


def test_one_group_a_row_and_groups_of_equal_weights() -> None:
    """The features of a row are then collinear, or zero."""
    weight, hessian = layers.weight(8, 64), layers.hessian(64, "power")
    weight[2] = 0.25
    weight[3, :32] = 0.0
    for group in (32, 64):
        own = solve(weight, hessian, group_size=group, effort="fast")
        nested = solve(weight, hessian, group_size=group, effort="fast", tied=True)
        assert torch.isfinite(nested.dequantize(2)).all()
        assert float(nested.loss[2].sum()) < 1.2 * float(own.loss[2].sum())
        assert float((nested.dequantize(2)[2] - 0.25).abs().max()) < 1e-3
        assert list(nested.parts()) == list(layout.stored_names(tied=True))


def test_targets_of_their_own() -> None:
    weight, hessian = layers.weight(16, 64), layers.hessian(64, "power")
    aims = {2: weight + 0.01, 3: weight, 4: weight - 0.01}
    nested = solve(weight, hessian, effort="fast", tied=True, targets=aims)
    # 2e-2 apart, which o and e of a row follow.
    gap = (nested.dequantize(2) - nested.dequantize(4)).mean()
    assert 0.01 < float(gap) < 0.03


# -- the trained model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(demo_model: Path) -> dict[str, list[Tensor]]:
    """Weights of the demo model's third layer with the mean of x x^T over real text."""
    source, tokenizer = CheckpointSource(demo_model), load_tokenizer(demo_model)
    text = inspect.getsource(argparse) + inspect.getsource(textwrap)
    ids_NS = torch.tensor(tokenizer(text)["input_ids"][: 16 * 256]).view(16, 256)
    model = load_source(source).eval()
    layer, found = model.model.layers[2], {}
    linears = {"o_proj": layer.self_attn.o_proj, "down_proj": layer.mlp.shared.down_proj}
    handles = []
    for name, linear in linears.items():
        found[name] = [linear.weight.detach()[:64], torch.zeros(linear.in_features, 1)]

        def see(_: object, args: tuple[Tensor, ...], name: str = name) -> None:
            x = args[0].flatten(0, -2).double()
            found[name][1] = found[name][1] + x.T @ x

        handles.append(linear.register_forward_pre_hook(see))
    with torch.no_grad():
        model(input_ids=ids_NS, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: [weight, total.float()] for name, (weight, total) in found.items()}


@pytest.mark.parametrize("name", ["o_proj", "down_proj"])
def test_little_is_lost_on_a_trained_layer(name: str, trained: dict[str, list[Tensor]]) -> None:
    weight, hessian = trained[name]
    own, tied = (solve(weight, hessian, tied=tied) for tied in (False, True))
    ratio = {k: float(tied.loss[k].sum() / own.loss[k].sum()) for k in (2, 3, 4)}
    assert 0.95 < ratio[2] < 1.08
    assert 0.95 < ratio[3] < 1.1
    assert 0.95 < ratio[4] < 1.16
    # Floats of the widest whose cells are merely aligned lose much more.
    scale, zero = own.scale[4] * 4, own.zero[4] + own.scale[4] * 1.5
    aligned = replace(own, scale={**own.scale, 2: scale}, zero={**own.zero, 2: zero})
    loss = layers.loss_rows(aligned.dequantize(2) - weight, hessian).sum()
    assert loss > 1.15 * float(own.loss[2].sum())
    bits = 8 * layout.stored_bytes(weight.shape, 64, tied=True) / weight.numel()
    assert bits == 4.5 + 96 / weight.shape[1]
    held = sum(part.numel() * part.element_size() for part in tied.parts().values())
    assert 8 * held / weight.numel() == bits


# -- what does not go together -------------------------------------------------------------------


def test_one_width_and_trained_floats_are_refused() -> None:
    weight, hessian = layers.weight(8, 64), layers.hessian(64, "iid")
    with pytest.raises(ValueError, match=r"widths \[3\]: tied floats need two or three"):
        solve(weight, hessian, widths=(3,), tied=True)
    nested = solve(weight, hessian, effort="fast", tied=True)
    with pytest.raises(ValueError, match="tied floats are fitted, not trained"):
        SoftFloats(nested)
    other = replace(nested, scale={**nested.scale, 2: 2 * nested.scale[2]})
    with pytest.raises(AssertionError, match="2 bits: not what is tied"):
        other.parts()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": {"steps": 5}}, r"tied: floats are fitted, not trained: block.steps 5"),
        ({"tune": {"steps": 7}}, r"tied: floats are fitted, not trained: tune.steps 7"),
        ({"method": "decoupleq", "widths": [2]}, "tied: decoupleq makes one width"),
        ({"widths": [2]}, r"tied: widths \[2\] need two of 2, 3 and 4"),
        ({"budget": "2.5bpw"}, "tied: under a budget a weight has one width"),
        ({"widths": [4, 6, 8]}, r"tied: widths \[4, 6, 8\] need two of 2, 3 and 4"),
    ],
)
def test_recipes_that_do_not_fit(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Quantize.model_validate({"tied": True, **changes})


@pytest.mark.parametrize("effort", ["fast", "balanced", "best"])
def test_tied_floats_train_nothing_by_default(effort: Effort) -> None:
    tied = Quantize.model_validate({"tied": True, "effort": effort, "widths": [2, 3, 4, 6]})
    assert (tied.block.steps, tied.tune.steps) == (0, 0)
    own = Quantize.model_validate({"effort": effort})
    assert not own.tied
    assert (own.block.steps > 0) == (effort != "fast")
    assert (own.blend, own.companding) == (tied.blend, tied.companding)
