"""Columns of codes: the stored parts bit for bit, and products against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fissile.kernels import columns as col
from fissile.kernels.layout import (
    dequantize,
    encode_theta,
    loaded_bytes,
    pack,
    pack_residual,
    segment_names,
)

CASES = [
    # bits, companding, (E, N, K), group
    (2, 1.0, (1, 24, 64), 32),
    (3, 1.0, (3, 10, 96), 32),
    (4, 1.0, (3, 33, 128), 64),
    (6, 1.0, (2, 20, 64), 64),
    (8, 1.0, (2, 7, 128), 32),
    (3, 1.5, (1, 12, 64), 64),
    (4, 2.0, (2, 12, 64), 32),
    (4, 1.5, (1, 10, 64), 32),
    (3, 2.0, (1, 6, 64), 32),
    (8, 1.5, (1, 14, 64), 32),
]


def random_parts(bits: int, shape: tuple[int, ...], group: int, seed: int = 0) -> dict[str, Tensor]:
    """Stored parts of a random weight at one width."""
    rng = torch.Generator().manual_seed(seed)

    def draw(high: int) -> Tensor:
        return torch.randint(0, high, shape, generator=rng, dtype=torch.uint8)

    def theta(size: float) -> Tensor:
        groups = (*shape[:-1], shape[-1] // group)
        scale = torch.rand(groups, generator=rng) * size + size / 4
        return encode_theta(scale, torch.randn(groups, generator=rng) * size * 4)

    parts = pack(draw(16)) | pack_residual(draw(16))
    parts |= {
        f"theta_{min(bits, 4)}": theta(0.1),
        f"theta_{bits}": theta(0.1 if bits < 5 else 0.01),
    }
    return {name: parts[name] for name in segment_names(bits, (min(bits, 4), bits))}


@pytest.mark.parametrize(("bits", "companding", "shape", "group"), CASES)
def test_columns_hold_the_weight(
    bits: int, companding: float, shape: tuple[int, int, int], group: int
) -> None:
    parts = random_parts(bits, shape, group)
    held = col.to_columns(parts, bits, companding)
    back = col.from_columns(held)
    assert list(back) == list(parts)
    assert all(torch.equal(back[name], parts[name]) for name in parts)
    weight = dequantize(parts, bits, companding)
    for e in range(shape[0]):
        assert torch.equal(col.decode(held, e, 0, held.groups).T, weight[e])
    flat = {name: part[0] for name, part in parts.items()}
    again = col.from_columns(col.to_columns(flat, bits, companding))
    assert all(torch.equal(again[name], flat[name]) for name in flat)


@pytest.mark.parametrize("mode", ["plain", "threads", "slices"])
@pytest.mark.parametrize(("bits", "companding", "shape", "group"), CASES)
def test_products_equal_float64(
    bits: int,
    companding: float,
    shape: tuple[int, int, int],
    group: int,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if mode == "threads":
        monkeypatch.setattr(col, "_PART", 1)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if mode == "slices":
        monkeypatch.setattr(col, "_SCRATCH", 1)
        monkeypatch.setattr(col, "_SUMS", 2 * shape[1] * shape[2] // group)
    parts = random_parts(bits, shape, group, seed=1)
    held = col.to_columns(parts, bits, companding)
    weight = dequantize(parts, bits, companding).double()
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(5, shape[2], generator=rng)
    experts = torch.randint(0, shape[0], (5,), generator=rng)
    size = (x.double().abs() @ weight[0].abs().T).mean()

    def check(got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape
        assert float((got.double() - want).abs().max() / size) < 2e-6

    check(col.multiply(x, held), x.double() @ weight[0].T)
    check(col.multiply(x, held, experts), torch.einsum("rk,rnk->rn", x.double(), weight[experts]))
    for none in (None, experts[:0]):
        assert col.multiply(x[:0], held, none).shape == (0, shape[1])
    for e in range(shape[0]):
        check(col.multiply_decoded(x, held, e), x.double() @ weight[e].T)


@pytest.mark.parametrize("part", [1, 1 << 14, 1 << 30])
def test_rows_do_not_depend_on_their_companions(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do threads change that: over groups, over rows, and without."""
    monkeypatch.setattr(col, "_PART", part)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    held = col.to_columns(random_parts(4, (2, 48, 128), 32), 4)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(3))
    experts = torch.arange(9) % 2
    one_by_one = [col.multiply(x[i : i + 1], held) for i in range(9)]
    assert torch.equal(col.multiply(x, held), torch.cat(one_by_one))
    whole = col.multiply(x, held, experts)
    assert torch.equal(whole[3:5], col.multiply(x[3:5], held, experts[3:5]))


def test_inputs_of_another_width_are_refused() -> None:
    held = col.to_columns(random_parts(4, (16, 64), 32), 4)
    with pytest.raises(ValueError, match="x has K 32, the weight has K 64"):
        col.multiply(torch.ones(1, 32), held)


@pytest.mark.parametrize(
    ("bits", "companding", "most"),
    [(2, 1, 1.03), (3, 1, 1.31), (4, 1, 1.02), (8, 1, 1.02), (2, 1.5, 1.03), (4, 1.5, 1.48)],
)
def test_memory_stays_near_the_packed_size(bits: int, companding: float, most: float) -> None:
    """Three bits are held as four, companded values as six; a row of a table ends in four bytes."""
    shape, group = (1, 512, 128), 64
    held = col.to_columns(random_parts(bits, shape, group), bits, companding)
    size = sum(t.numel() * t.element_size() for t in held.tensors().values())
    assert loaded_bytes(shape, group, bits) < size < most * loaded_bytes(shape, group, bits)


def test_products_compile_and_work_in_any_mode() -> None:
    held = col.to_columns(random_parts(4, (32, 64), 32), 4)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        first = col.multiply(x, held)
    outside: Any = col.multiply(x.clone().requires_grad_(), held)
    assert torch.equal(first, outside.detach())

    def product(x: Tensor) -> Tensor:
        return col.multiply(x, held) * 2

    compiled = torch.compile(product, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), first * 2)
