"""The packed format against plain integers, numpy's float16 and a float64 product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fissile.kernels import layout
from fissile.kernels.reference import nested_matmul


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)


def random_parts(
    *shape: int, group_size: int, widths: tuple[int, ...] = (2, 3, 4)
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parts = layout.pack(random_codes(*shape))
    for bits in widths:
        floats = torch.randn(2, *shape[:-1], shape[-1] // group_size, generator=generator)
        parts[f"theta_{bits}"] = layout.encode_theta(floats[0].abs(), floats[1])
    return {name: parts[name] for name in layout.stored_names(widths)}


@pytest.mark.parametrize("shape", [(1, 8), (5, 40), (3, 7, 128)])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_of_every_width_are_prefixes_of_the_stored_code(
    shape: tuple[int, ...], bits: int
) -> None:
    codes = random_codes(*shape)
    planes = layout.pack(codes)
    assert torch.equal(layout.unpack(planes, bits), codes >> (4 - bits))


def test_bits_lie_where_the_format_says() -> None:
    codes = [0b1011, 0b0110, 0b1100, 0b0001, 0b1111, 0b0000, 0b0100, 0b1010]
    planes = layout.pack(torch.tensor([codes], dtype=torch.uint8))
    assert planes["plane_2"].tolist() == [
        [sum((codes[4 * i + j] >> 2) << (2 * j) for j in range(4)) for i in range(2)]
    ]
    assert planes["plane_3"].tolist() == [[sum(((c >> 1) & 1) << j for j, c in enumerate(codes))]]
    assert planes["plane_4"].tolist() == [[sum((c & 1) << j for j, c in enumerate(codes))]]


def test_a_narrow_load_needs_no_higher_plane() -> None:
    codes = random_codes(4, 16)
    planes = layout.pack(codes)
    assert torch.equal(layout.unpack({"plane_2": planes["plane_2"]}, 2), codes >> 2)
    del planes["plane_3"]
    with pytest.raises(ValueError, match=r"plane_3 is missing, needed for 4 bits"):
        layout.unpack(planes, 4)


def test_theta_is_the_bit_pattern_of_float16() -> None:
    scale = torch.tensor([[0.1234567, 1e-6, 65504.0]])
    zero = torch.tensor([[-0.3, 7.0, -1e-9]])
    theta = layout.encode_theta(scale, zero)
    expected = np.stack([scale.numpy(), zero.numpy()], -1).astype(np.float16)
    assert theta.dtype == torch.int16
    assert np.array_equal(theta.numpy(), expected.view(np.int16))
    back = torch.stack(layout.decode_theta(theta), -1)
    assert np.array_equal(back.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("bad", [1e5, float("nan"), float("inf")])
def test_floats_outside_float16_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="does not fit float16"):
        layout.encode_theta(torch.tensor([1.0, bad]), torch.zeros(2))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dequantize_is_scale_times_code_plus_zero(bits: int) -> None:
    parts = random_parts(2, 6, 48, group_size=16)
    theta = parts[f"theta_{bits}"].numpy().view(np.float16).astype(np.float32)
    codes = (random_codes(2, 6, 48) >> (4 - bits)).numpy().astype(np.float32)
    expected = codes.reshape(2, 6, 3, 16) * theta[..., :1] + theta[..., 1:]
    got = layout.dequantize(parts, bits)
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), expected.reshape(2, 6, 48))


@pytest.mark.parametrize("widths", [(2,), (3,), (2, 3), (2, 4), (2, 3, 4)])
def test_accounting_equals_the_bytes_of_the_tensors(widths: tuple[int, ...]) -> None:
    shape, group_size = (3, 10, 96), 32
    parts = random_parts(*shape, group_size=group_size, widths=widths)
    sizes = {name: part.numel() * part.element_size() for name, part in parts.items()}
    assert layout.stored_bytes(shape, group_size, widths) == sum(sizes.values())
    for name, part in parts.items():
        assert layout.part_shape(name, shape, group_size) == tuple(part.shape)
    for bits in widths:
        names = layout.segment_names(bits, widths)
        assert layout.loaded_bytes(shape, group_size, bits) == sum(sizes[n] for n in names)
        assert torch.isfinite(layout.dequantize({n: parts[n] for n in names}, bits)).all()


def test_bits_per_weight_count_the_floats() -> None:
    assert [layout.bits_per_weight((512, 256), 64, bits) for bits in (2, 3, 4)] == [2.5, 3.5, 4.5]
    assert layout.bits_per_weight((512, 256), 128, 2) == 2.25


def test_segments_come_in_load_order() -> None:
    assert layout.segment_names(2) == ("plane_2", "theta_2")
    assert layout.segment_names(3) == ("plane_2", "plane_3", "theta_3")
    assert layout.segment_names(4, (2, 4)) == ("plane_2", "plane_3", "plane_4", "theta_4")
    assert layout.stored_names((2, 4)) == ("plane_2", "theta_2", "plane_3", "plane_4", "theta_4")
    with pytest.raises(ValueError, match=r"bits 3 .* \[2, 4\]"):
        layout.segment_names(3, (2, 4))


def test_pack_refuses_what_it_cannot_store() -> None:
    with pytest.raises(ValueError, match="codes hold 16"):
        layout.pack(torch.full((1, 8), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        layout.pack(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="K 12 is not a positive multiple of 8"):
        layout.pack(torch.zeros(1, 12, dtype=torch.uint8))
    with pytest.raises(ValueError, match="group_size 48 does not divide K 64"):
        layout.check_shape(64, 48)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_reference_product_equals_the_decoded_matrix(bits: int, batch: tuple[int, ...]) -> None:
    parts = random_parts(*batch, 20, 64, group_size=16)
    x = torch.randn(*batch, 9, 64, generator=torch.Generator().manual_seed(2))
    want = x.double() @ layout.dequantize(parts, bits).double().transpose(-1, -2)
    got = nested_matmul(x, parts, bits)
    assert got.shape == want.shape
    assert (got - want).norm() / want.norm() < 1e-6


def test_reference_product_refuses_another_width() -> None:
    parts = random_parts(4, 16, group_size=16)
    with pytest.raises(ValueError, match="x has K 8, the weight has K 16"):
        nested_matmul(torch.zeros(2, 8), parts, 2)
