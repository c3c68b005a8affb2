"""The order of the kernels against the stored format and against bits picked by hand."""

from __future__ import annotations

import pytest
import torch

from fissile.kernels import layout, tiles
from fissile.kernels.fields import block_codes

BITS = (2, 3, 4, 8)


def stored(
    experts: int, rows: int, inputs: int, group_size: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Parts of all widths, random codes and floats."""
    generator = torch.Generator().manual_seed(seed)

    def codes() -> torch.Tensor:
        shape = (experts, rows, inputs)
        return torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)

    parts = layout.pack(codes()) | layout.pack_residual(codes())
    for bits in layout.WIDTHS:
        floats = torch.randn(2, experts, rows, inputs // group_size, generator=generator)
        parts[f"theta_{bits}"] = layout.encode_theta(floats[0], floats[1])
    return parts


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("experts", "rows", "inputs", "group_size"),
    [(1, 256, 512, 128), (3, 40, 96, 32), (2, 150, 448, 64)],
)
def test_tiles_decode_to_the_stored_weight_bit_for_bit(
    bits: int, paired: bool, experts: int, rows: int, inputs: int, group_size: int
) -> None:
    parts = stored(experts, rows, inputs, group_size)
    weight = tiles.tile(parts, bits, paired=paired)
    assert weight.shape == (experts, rows, inputs)
    assert torch.equal(tiles.untile(weight), layout.dequantize(parts, bits))
    back = tiles.stored_parts(weight)
    assert set(back) == set(layout.segment_names(bits))
    assert all(torch.equal(part, parts[name]) for name, part in back.items())


@pytest.mark.parametrize("bits", BITS)
def test_whole_blocks_take_exactly_their_bits(bits: int) -> None:
    parts = stored(2, 256, 1024, 128)
    weight = tiles.tile(parts, bits)
    codes = weight.codes.nbytes + (0 if weight.extra is None else weight.extra.nbytes)
    assert codes * 8 == bits * 2 * 256 * 1024
    floats = weight.theta.nbytes + (0 if weight.theta_extra is None else weight.theta_extra.nbytes)
    assert floats == (2 if bits == 8 else 1) * 2 * 256 * 1024 // 128 * 4
    assert weight.nbytes == codes + floats


def test_bits_lie_where_the_module_says() -> None:
    parts = stored(1, 300, 1024, 64, seed=3)
    row, inputs = 200, (0, 33, 255, 256, 511, 700, 1023)
    for bits in BITS:
        weight = tiles.tile(parts, bits)
        code = layout.unpack(parts, min(bits, 4))[0, row]
        residual = layout.unpack_residual(parts, 8)[0, row]
        for k in inputs:
            block, within = divmod(k, block_codes(bits))
            span = 256 if bits == 3 else block_codes(bits)
            half, e, i = within // span, within % span // 32, within % 32
            word = int(weight.codes[0, 1, block, half, row - 128, i]) & 0xFFFF
            if bits == 2:
                got = word >> (2 * e) & 3
            elif bits == 3:
                assert weight.extra is not None
                low = int(weight.extra[0, 1, block, row - 128, i]) >> (2 * e + half) & 1
                got = (word >> (2 * e) & 3) << 1 | low
            else:
                got = word >> (4 * e) & 15
            assert got == int(code[k])
            if bits == 8:
                assert weight.extra is not None
                assert int(weight.extra[0, 1, block, row - 128, i]) >> (4 * e) & 15 == residual[k]


def test_pairs_alternate_by_eight_rows() -> None:
    order = tiles.row_order(2 * 72, True).tolist()
    assert order[:24] == [*range(8), *range(72, 80), *range(8, 16)]
    assert order[128:144] == [*range(64, 72), *range(136, 144)]
    assert order[144:] == [-1] * 112


def test_padding_decodes_to_zero() -> None:
    weight = tiles.tile(stored(1, 40, 96, 32), 4)
    assert weight.codes.shape == (1, 1, 1, 1, 128, 32)
    assert weight.theta.shape == (1, 1, 4, 128)
    assert not weight.theta[:, :, 3].any()
    assert not weight.theta[..., 40:].any()
    assert not weight.codes[..., 40:, :].any()


def test_what_the_kernels_do_not_take_is_refused_with_the_reason() -> None:
    parts = stored(1, 16, 96, 48)
    with pytest.raises(ValueError, match="group_size 48: the kernels take 32, 64, 128"):
        tiles.tile(parts, 4)
    parts = stored(1, 15, 64, 32)
    with pytest.raises(ValueError, match="bits 6: the kernels take 2, 3, 4, 8"):
        tiles.tile(parts, 6)
    with pytest.raises(ValueError, match="15 rows are no pairs"):
        tiles.tile(parts, 4, paired=True)
    with pytest.raises(ValueError, match=r"companding 1\.5"):
        tiles.tile(parts, 4, companding=1.5)
    assert torch.equal(
        tiles.untile(tiles.tile(parts, 2, companding=1.5)), layout.dequantize(parts, 2, 1.5)
    )


def test_a_weight_moves_as_a_whole() -> None:
    weight = tiles.tile(stored(1, 16, 64, 32), 3)
    moved = weight.to("meta")
    assert {part.device.type for part in moved.tensors().values()} == {"meta"}
    assert set(moved.tensors()) == {"codes", "extra", "theta"}
