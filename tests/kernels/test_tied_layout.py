"""Tied floats in the packed format: numpy's float16, bytes of tensors, every decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fissile.kernels import columns, layout, tiles

WIDTHS = [(2, 3, 4), (2, 4), (2, 3), (3, 4), (2, 3, 4, 6), (2, 4, 6, 8)]


def random_parts(
    widths: tuple[int, ...], shape: tuple[int, ...], group: int, seed: int = 0
) -> dict[str, Tensor]:
    """All stored parts of a random weight with tied floats."""
    rng = torch.Generator().manual_seed(seed)
    draw = torch.randint(0, 16, (2, *shape), generator=rng, dtype=torch.uint8)
    parts = layout.pack(draw[0]) | layout.pack_residual(draw[1])
    groups = (*shape[:-1], shape[-1] // group)
    for width in layout.WIDTHS:
        scale = torch.rand(groups, generator=rng) * 0.1 + 0.02
        parts[f"theta_{width}"] = layout.encode_theta(
            scale, torch.randn(groups, generator=rng) * 0.3
        )
        ties = torch.randn(*shape[:-1], 3, generator=rng)
        ties[..., 0] = ties[..., 0].abs() + 0.5
        parts[f"tied_{width}"] = layout.encode_tied(ties)
    return {name: parts[name] for name in layout.stored_names(widths, tied=True)}


def by_hand(parts: dict[str, Tensor], bits: int, base: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of a tied width: float64 by numpy, rounded once to float32, then to float16.

    The products are exact in float64 and in float32, so the one rounding of the sum is the same.
    """
    theta = parts[f"theta_{base}"].numpy().view(np.float16).astype(np.float64)
    a, o, e = np.moveaxis(parts[f"tied_{bits}"].numpy().view(np.float16).astype(np.float64), -1, 0)
    scale, zero = theta[..., 0], theta[..., 1]
    own = a[..., None] * scale, o[..., None] * scale + e[..., None] * zero
    return tuple(x.astype(np.float32).astype(np.float16) for x in own)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 128)])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_narrow_width_decodes_as_written(widths: tuple[int, ...], shape: tuple[int, ...]) -> None:
    parts, base = random_parts(widths, shape, 32), layout.tied_base(widths)
    for bits in (k for k in widths if k < base):
        own = {name: parts[name] for name in layout.segment_names(bits, widths, tied=True)}
        scale, zero = by_hand(own, bits, base)
        codes = layout.unpack(parts, bits).numpy().astype(np.float32)
        grouped = codes.reshape(*scale.shape, -1)
        want = grouped * scale.astype(np.float32)[..., None] + zero.astype(np.float32)[..., None]
        got = layout.dequantize(own, bits)
        assert np.array_equal(got.numpy(), want.reshape(shape))
        assert got.std() > 0


def test_the_expansion_is_the_same_however_it_is_summed() -> None:
    """A fused multiply-add, the other order, float64: the products are exact, so all agree."""
    parts = random_parts((2, 3, 4), (64, 512), 32, seed=3)
    ties = layout.decode_tied(parts["tied_2"])
    scale, zero = layout.decode_theta(parts["theta_4"])
    got = layout.tied_floats(ties, scale, zero)
    a, o, e = ties.double().unsqueeze(-2).unbind(-1)
    assert torch.equal(got[0], (a * scale.double()).float().half().float())
    fused = torch.addcmul((e * zero.double()), o, scale.double()).float()
    assert torch.equal(got[1], fused.half().float())
    assert torch.equal(got[1], (e.float() * zero + o.float() * scale).half().float())


@pytest.mark.parametrize("widths", WIDTHS)
def test_bytes_and_order_of_the_parts(widths: tuple[int, ...]) -> None:
    shape, group, base = (3, 5, 128), 32, layout.tied_base(widths)
    parts = random_parts(widths, shape, group)
    sizes = {name: part.numel() * part.element_size() for name, part in parts.items()}
    assert layout.stored_bytes(shape, group, widths, tied=True) == sum(sizes.values())
    names = list(parts)
    assert next(n for n in names if n.startswith("theta")) == f"theta_{base}"
    assert sum(n.startswith("tied") for n in names) == sum(k < base for k in widths)
    for name, part in parts.items():
        assert layout.part_shape(name, shape, group) == tuple(part.shape)
        assert layout.part_dtype(name) == part.dtype
    for bits in widths:
        own = layout.segment_names(bits, widths, tied=True)
        found = layout.loaded_bytes(shape, group, bits, widths, tied=True)
        assert found == sum(sizes[name] for name in own)
        # In file order, and a prefix of it but for coefficients of other widths.
        reach = names[: names.index(own[-1]) + 1]
        assert own == tuple(n for n in reach if n in own)
        assert all(n.startswith(("tied", "theta")) for n in set(reach) - set(own))
        assert torch.isfinite(layout.dequantize({n: parts[n] for n in own}, bits)).all()


def test_all_widths_cost_little_more_than_the_widest() -> None:
    shape, group = (512, 4096), 64
    bits = 8 * layout.stored_bytes(shape, group, tied=True) / (512 * 4096)
    assert bits == 4.5 + 2 * 3 * 16 / 4096
    assert 8 * layout.stored_bytes(shape, group) / (512 * 4096) == 5.5


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_other_forms_hold_the_same_weight(bits: int, stacked: bool) -> None:
    widths, shape = (2, 3, 4, 6), ((2,) if stacked else ()) + (16, 64)
    parts = random_parts(widths, shape, 32)
    own = {name: parts[name] for name in layout.segment_names(bits, widths, tied=True)}
    want = layout.dequantize(own, bits)
    assert torch.equal(tiles.untile(tiles.tile(own, bits)).view(shape), want)
    held = columns.to_columns(own, bits)
    for e, expected in enumerate(want.view(-1, 16, 64)):
        assert torch.equal(columns.decode(held, e, 0, held.groups).T, expected)


@pytest.mark.parametrize("missing", ["theta_4", "tied_2"])
def test_what_is_missing_is_named(missing: str) -> None:
    parts = random_parts((2, 3, 4), (4, 64), 32)
    del parts[missing]
    with pytest.raises(ValueError, match="theta_2 is missing, needed for 2 bits"):
        layout.dequantize(parts, 2)


def test_coefficients_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="coefficient 70000 does not fit float16"):
        layout.encode_tied(torch.tensor([[1.0, 7e4, 1.0]]))
